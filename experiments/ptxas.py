"""What ptxas says of the kernels that a compile left behind.

Knows dump folders and ptxas's words. Imports no jax: its flags must stand before that.
"""

import os
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

_state: dict[str, Path] = {}
# Kernels of ours, by the names that they carry in PTX.
_OURS = re.compile(r"paged_|turn_keys")


def dump_flags(folder: str) -> str:
    """XLA flags that leave the PTX of every kernel in `folder`.

    Mosaic GPU compiles kernels by itself and is told by an environment variable. It
    complains where nvdisasm is missing, with a stack trace that takes seconds to name.
    """
    _state["folder"] = Path(folder)
    os.environ["MOSAIC_GPU_DUMP_TO"] = folder
    os.environ["LLVM_DISABLE_SYMBOLIZATION"] = "1"
    return f"--xla_dump_to={folder} --xla_dump_emitter_re=.*"


def kernel_reports() -> list[tuple[str, int, int, int]]:
    """(name, registers, spilled bytes, shared bytes) of our kernels dumped since the
    last call; the same report once.
    """
    found = {}
    for path in sorted(_state["folder"].glob("*.ptx")):
        if _OURS.search(path.read_text()):
            report = _report(path)
            found[report] = None
    for path in _state["folder"].iterdir():
        path.unlink()
    return list(found)


def _report(path: Path) -> tuple[str, int, int, int]:
    text = path.read_text()
    entry = re.search(r"\.entry\s+(\w+)", text)
    done = subprocess.run(
        [_ptxas(), "-v", "-arch=sm_90a", str(path), "-o", "/dev/null"],
        capture_output=True,
        text=True,
        check=True,
    )
    numbers = [
        re.search(pattern, done.stderr)
        for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores")
    ]
    registers, spilled = (int(found[1]) if found else 0 for found in numbers)
    # Dynamic shared memory is asked for at launch and stands in no report of ptxas;
    # Mosaic GPU writes it down.
    shared = re.search(r"(\d+) bytes smem", done.stderr)
    resources = path.with_suffix(".resources.txt")
    if resources.exists():
        shared = re.search(r"smem_scratch_bytes=(\d+)", resources.read_text())
    return entry[1] if entry else path.stem, registers, spilled, _bytes(shared)


def _bytes(found: re.Match | None) -> int:
    return int(found[1]) if found else 0


def _ptxas() -> str:
    spec = find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(root).glob("**/bin/ptxas")):
            return str(path)
    raise FileNotFoundError(
        "ptxas was not found; install the CUDA packages: pip install '.[cuda]'"
    )
