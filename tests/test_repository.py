"""The structure of the project: who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("cachedattn_jax", "experiments", "pallas_kernels")
# Never import jax, directly or through what they import.
PURE = (
    "cachedattn_jax",
    "cachedattn_jax.engine.request",
    "cachedattn_jax.engine.scheduler",
    "cachedattn_jax.engine.turn",
    "cachedattn_jax.model.config",
    "cachedattn_jax.store.budget",
    "cachedattn_jax.store.layout",
    "cachedattn_jax.store.page",
    "cachedattn_jax.store.placement",
    "experiments.generator",
    "experiments.mooncake",
    "experiments.sampled_lengths",
    "experiments.sharegpt",
)
# (who, what they may not import)
FORBIDDEN = (
    ("pallas_kernels", ("cachedattn_jax", "experiments")),
    ("cachedattn_jax", ("experiments",)),
    ("cachedattn_jax.store", ("cachedattn_jax.engine", "cachedattn_jax.model")),
    ("cachedattn_jax.model", ("cachedattn_jax.engine", "cachedattn_jax.store")),
    ("cachedattn_jax.engine.scheduler", ("cachedattn_jax.store",)),
)


def modules() -> dict[str, Path]:
    paths = (p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
    return {
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
        for p in paths
    }


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize(("who", "forbidden"), FORBIDDEN)
def test_imports_point_down(who, forbidden):
    for name, path in modules().items():
        if is_in(name, who):
            for imported in imports(path):
                assert not any(is_in(imported, f) for f in forbidden), (name, imported)


def test_gin_is_imported_in_one_module_and_threads_start_in_the_store_only():
    for name, path in modules().items():
        found = imports(path)
        uses_gin = any(is_in(imported, "gin") for imported in found)
        assert not uses_gin or name == "cachedattn_jax.config"
        starts_threads = any(
            "ThreadPoolExecutor" in i or i == "threading" for i in found
        )
        assert not starts_threads or is_in(name, "cachedattn_jax.store"), name


def test_pure_modules_do_not_pull_jax_in():
    program = (
        f"import importlib, sys\nfor name in {PURE!r}: importlib.import_module(name)\n"
        "assert 'jax' not in sys.modules and 'gin' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_package_files_hold_a_docstring_only():
    for name, path in modules().items():
        if path.name == "__init__.py" and name != "cachedattn_jax":
            body = ast.parse(path.read_text()).body
            assert len(body) == 1 and ast.get_docstring(ast.parse(path.read_text()))


def test_public_names_resolve():
    import cachedattn_jax

    for name in cachedattn_jax.__all__:
        assert getattr(cachedattn_jax, name).__doc__
    with pytest.raises(AttributeError, match="nothing"):
        cachedattn_jax.nothing  # noqa: B018
