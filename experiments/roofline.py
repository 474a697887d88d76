"""The least work of every kernel and program, what its compiled form does, and the time
that this takes at best on known chips.

Run as `make roofline`, which installs the compiler. Knows rates of chips. Does not know
how programs work: `programs` counts the least, `hlo` reads the compiled.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from experiments.ahead_of_time import prepare

# The targets: bytes of a decode and operations of a prefill over their least.
MOST_DECODE_BYTES, MOST_PREFILL_FLOPS = 1.10, 1.05
MODELS = ("llama-3-8b", "llama-2-13b")
GIGA = 1e9


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Rates of one chip.

    Attributes:
        bytes_s: device memory; H200: a copy as measured, TPUs: as published.
        flops_s: bfloat16 products; H200: 8192 x 8192 as measured, TPUs: as published.
    """

    name: str
    bytes_s: float
    flops_s: float

    def bound_s(self, num_bytes: float, flops: float) -> tuple[float, str]:
        """The least time, and what limits it."""
        memory, compute = num_bytes / self.bytes_s, flops / self.flops_s
        return max(memory, compute), "memory" if memory > compute else "compute"


CHIPS = (
    Chip(name="H200", bytes_s=4.3e12, flops_s=790e12),
    Chip(name="v5e", bytes_s=0.819e12, flops_s=197e12),
    Chip(name="v6e", bytes_s=1.64e12, flops_s=918e12),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A program's least work and what its compiled form does."""

    model: str
    program: str
    min_bytes: float
    min_flops: float
    num_bytes: float
    flops: float

    @property
    def bytes_ratio(self) -> float:
        return self.num_bytes / self.min_bytes

    @property
    def flops_ratio(self) -> float | None:
        return self.flops / self.min_flops if self.min_flops else None

    @property
    def misses(self) -> str:
        """Which target it misses, in words; empty where it has none or holds it.

        Prefill attention by itself has none: it works in whole blocks, whose share of
        a layer's operations is small.
        """
        if self.program.startswith("decode") and self.bytes_ratio > MOST_DECODE_BYTES:
            return f"bytes above {MOST_DECODE_BYTES}x"
        ratio = self.flops_ratio or 0.0
        if self.program.startswith("prefill_group") and ratio > MOST_PREFILL_FLOPS:
            return f"operations above {MOST_PREFILL_FLOPS}x"
        return ""


def rows() -> Iterator[Row]:
    """One row a program, compiled for a v5p, whose memory holds every model here."""
    import jax
    from jax.experimental.topologies import get_topology_desc

    from experiments.hlo import device_bytes
    from experiments.programs import kernel_programs, model_programs
    from experiments.shapes import mesh_of, shapes
    from pallas_kernels.backends import Kernels

    devices = get_topology_desc("v5p:2x2x1", platform="tpu").devices
    kernels = Kernels(prefill="mosaic_tpu", decode="mosaic_tpu")
    for model in MODELS:
        at = shapes(model, mesh_of(devices[:1]), kernels, page_tokens=64)
        for program in (*kernel_programs(at), *model_programs(at)):
            with jax.set_mesh(program.mesh):
                jitted = jax.jit(program.function, donate_argnums=program.donated)
                compiled = jitted.lower(*program.arguments).compile()
            flops = (compiled.cost_analysis() or {}).get("flops", 0.0)
            yield Row(
                model=model,
                program=program.name,
                min_bytes=program.min_bytes,
                min_flops=program.min_flops,
                num_bytes=device_bytes(str(compiled.as_text())),
                flops=flops if program.min_flops else 0.0,
            )


def _cells(row: Row) -> list[str]:
    bounds = [chip.bound_s(row.num_bytes, row.flops) for chip in CHIPS]
    ratio = row.flops_ratio
    return [
        row.model,
        row.program,
        f"{row.min_bytes / GIGA:,.3f}",
        f"{row.bytes_ratio:.3f}",
        f"{row.min_flops / GIGA:,.1f}",
        "-" if ratio is None else f"{ratio:.3f}",
        *(f"{1e3 * seconds:,.3f} {limit}" for seconds, limit in bounds),
        f"MISSED: {row.misses}" if row.misses else "ok",
    ]


HEADER = [
    "model",
    "program",
    "least GB",
    "compiled / least",
    "least GFLOP",
    "compiled / least",
    *(f"{chip.name} ms" for chip in CHIPS),
    "target",
]


def main(argv: list[str]) -> int:
    """`python -m experiments.roofline [--markdown FILE]`."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    parser = argparse.ArgumentParser(
        prog="python -m experiments.roofline", description=str(__doc__).split("\n\n")[0]
    )
    parser.add_argument("--markdown", type=Path, help="also write the table there")
    options = parser.parse_args(argv)
    prepare("tpu")
    console = Console(width=None if sys.stdout.isatty() else 200)
    found = list(
        track(
            rows(), "compiling", total=6 * len(MODELS), console=console, transient=True
        )
    )
    table = Table(*HEADER)
    for row in found:
        table.add_row(*_cells(row))
    console.print(table)
    if options.markdown:
        lines = [HEADER, ["---"] * len(HEADER), *map(_cells, found)]
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        options.markdown.write_text(text + "\n")
    return 1 if any(row.misses for row in found) else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
