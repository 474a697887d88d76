"""What holds of every file: which way imports point, and what a clone must not name."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import cachedattn_jax

CHECKOUT = Path(__file__).parent.parent
PACKAGES = ("cachedattn_jax", "pallas_kernels", "experiments")
SOURCES = sorted(path for name in PACKAGES for path in CHECKOUT.glob(f"{name}/**/*.py"))

# Who must not import whom. A name stands for itself and all below it.
FORBIDDEN = {
    "pallas_kernels": ["cachedattn_jax", "experiments", "tests", "flax"],
    "cachedattn_jax": ["experiments", "tests"],
    "experiments": ["tests"],
    "cachedattn_jax.model": [
        f"cachedattn_jax.{name}" for name in ("store", "engine", "simulator", "server")
    ],
    "cachedattn_jax.store": [
        f"cachedattn_jax.{name}" for name in ("model", "engine", "simulator", "server")
    ],
    "cachedattn_jax.engine": ["cachedattn_jax.simulator", "cachedattn_jax.server"],
    "cachedattn_jax.engine.scheduler": ["cachedattn_jax.store"],
    "cachedattn_jax.engine.cost_model": ["cachedattn_jax.store"],
    "cachedattn_jax.simulator": ["cachedattn_jax.server", "cachedattn_jax.model.llama"],
    "cachedattn_jax.run_directory": ["cachedattn_jax.engine", "cachedattn_jax.store"],
}
# Pure: importing them brings no jax, directly or through others.
PURE = [
    "cachedattn_jax",
    "cachedattn_jax.cli",
    "cachedattn_jax.config",
    "cachedattn_jax.engine.chunks",
    "cachedattn_jax.engine.cost_constants",
    "cachedattn_jax.engine.cost_model",
    "cachedattn_jax.engine.decision",
    "cachedattn_jax.engine.pipeline",
    "cachedattn_jax.engine.prefill_cost",
    "cachedattn_jax.engine.request",
    "cachedattn_jax.engine.scheduler",
    "cachedattn_jax.engine.truncation",
    "cachedattn_jax.exit_codes",
    "cachedattn_jax.gantt",
    "cachedattn_jax.model.config",
    "cachedattn_jax.model.hugging_face_config",
    "cachedattn_jax.run_directory",
    "cachedattn_jax.simulator",
    "cachedattn_jax.store.audit",
    "cachedattn_jax.store.objects.breaker",
    "cachedattn_jax.store.budget",
    "cachedattn_jax.store.chain",
    "cachedattn_jax.store.objects.fault_config",
    "cachedattn_jax.store.objects.io_config",
    "cachedattn_jax.store.layout",
    "cachedattn_jax.store.page",
    "cachedattn_jax.store.placement",
    "cachedattn_jax.store.placement.placement",
    "cachedattn_jax.store.truncation",
    "cachedattn_jax.store_cli",
    "cachedattn_jax.timeline",
    "experiments.workload",
]
# What only one place may import.
ONLY_IN = {
    "gin": "cachedattn_jax.config",
    "http": "cachedattn_jax.server",
    "threading": "cachedattn_jax.store",
    "concurrent.futures.ThreadPoolExecutor": "cachedattn_jax.store",
}
MAX_LINES = 300


def module_name(path: Path) -> str:
    parts = path.relative_to(CHECKOUT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(source: str) -> set[str]:
    """Everything a source imports, wherever it stands, but not for type checkers."""
    tree = ast.parse(source)
    skipped = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for node in ast.walk(branch)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def violations(module: str, source: str) -> list[str]:
    names = imported_names(source)
    wrong = [
        name
        for package, forbidden in FORBIDDEN.items()
        if is_within(module, package)
        for name in names
        if any(is_within(name, other) for other in forbidden)
    ]
    wrong += [
        name
        for only, place in ONLY_IN.items()
        if is_within(module, "cachedattn_jax") and not is_within(module, place)
        for name in names
        if is_within(name, only)
    ]
    if any(is_within(module, pure) for pure in PURE if pure != "cachedattn_jax"):
        # The command imports jax inside its functions, after the settings of jax.
        is_command = module == "cachedattn_jax.cli"
        wrong += [name for name in names if is_within(name, "jax") and not is_command]
    return wrong


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_down(path):
    assert violations(module_name(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pallas_kernels.rope", "from cachedattn_jax.model import config"),
        ("cachedattn_jax.engine.engine", "import experiments.workload"),
        ("cachedattn_jax.store.page_index", "from cachedattn_jax.engine import plan"),
        ("cachedattn_jax.engine.scheduler", "from cachedattn_jax.store import page"),
        ("cachedattn_jax.engine.scheduler", "def f():\n    import jax.numpy"),
        ("cachedattn_jax.store.placement", "from jax import numpy"),
        ("cachedattn_jax.engine.engine", "import gin"),
        ("cachedattn_jax.engine.engine", "import threading"),
        (
            "cachedattn_jax.engine.engine",
            "from concurrent.futures import ThreadPoolExecutor",
        ),
        ("cachedattn_jax.engine.engine", "from http.server import HTTPServer"),
    ],
)
def test_a_planted_import_is_caught(module, source):
    assert violations(module, source)


def test_pure_modules_bring_no_jax_and_only_config_brings_gin():
    existing = {module_name(path) for path in SOURCES}
    pure = sorted(existing.intersection(PURE) - {"cachedattn_jax.config"})
    code = f"""
import importlib, sys
def guilty(names, unwanted):
    return [n for n in names if importlib.import_module(n) and unwanted in sys.modules]
assert not (found := guilty({pure}, "jax")), ("jax", found)
assert "gin" not in sys.modules and "flax" not in sys.modules
assert not guilty(["cachedattn_jax.config"], "jax")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there():
    for name in cachedattn_jax.__all__:
        assert getattr(cachedattn_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Engin'"):
        cachedattn_jax.Engin  # noqa: B018


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_every_module_says_what_it_is(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    if path.name == "__init__.py" and module_name(path) != "cachedattn_jax":
        assert len(tree.body) == 1, "the __init__ of a package is its docstring"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_a_file_is_short_enough_to_be_read_at_once(path):
    num_lines = len(path.read_text().splitlines())
    assert num_lines <= MAX_LINES, "it holds more than one noun: find the other"


def test_no_file_names_a_folder_of_one_machine():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    roots = "|".join(("home", "root", "work", "Users", "mnt"))
    # A path at the start of a word; a URL has a name before its path.
    pattern = re.compile(rf"(?<![\w./}}])/(?:{roots})/")
    for name in listed.stdout.splitlines():
        try:
            text = (CHECKOUT / name).read_text()
        except (UnicodeDecodeError, FileNotFoundError):
            continue
        found = pattern.search(text)
        assert found is None, f"{name} names a path: {text[found.start() :][:60]}"


def test_tests_run_strictly_and_keep_their_compiled_programs():
    """jax was not imported before conftest.py had set it up."""
    assert jax.config.values["jax_numpy_dtype_promotion"] == "strict"
    assert jax.config.values["jax_compilation_cache_dir"]
