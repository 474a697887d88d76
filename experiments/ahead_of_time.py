"""Compiles every kernel and program for accelerators that are not there, in full.

Run as `python -m experiments.ahead_of_time tpu` or `... cuda`; `make compile-tpu` and
`make compile-cuda` install what it needs. Knows topologies and compilers' reports. Does
not know what the programs do.

A row fails when its program does not compile, when a temporary is as large as a pool
(then a pool was copied) or larger than the model's own largest intermediate, or when a
kernel of ours spills registers.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from experiments.programs import Program

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Target:
    """Devices to compile for.

    Attributes:
        topology: the name that the compiler knows the chips by.
        models: (preset, devices that share it); what fits their memory.
    """

    name: str
    topology: str
    models: tuple[tuple[str, int], ...]


# A v5e has 16 GB, a v6e 32 GB, a v5p 95 GB, an H200 141 GB: the weights in bfloat16
# take 16 GB (8B), 26 GB (13B) and 138 GB (70B).
TPU_TARGETS = (
    Target(
        name="v5e",
        topology="v5e:2x2",
        models=(("llama-3-8b", 4), ("llama-2-13b", 4)),
    ),
    Target(
        name="v6e",
        topology="v6e:2x2",
        models=(("llama-3-8b", 1), ("llama-2-13b", 4)),
    ),
    Target(
        name="v5p",
        topology="v5p:2x2x1",
        models=(("llama-3-8b", 1), ("llama-2-13b", 1), ("llama-2-70b", 4)),
    ),
)
CUDA_TARGET = Target(
    name="H200", topology="h200", models=(("llama-3-8b", 1), ("llama-2-13b", 1))
)
# What the compiler has to know of a device that is not there.
H200_CONFIG = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 62914560
  clock_rate_ghz: 1.98 device_memory_size: 150000000000
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
device_description_str: "NVIDIA H200"
"""


@dataclass(kw_only=True)
class Row:
    """What came of one program.

    Attributes:
        kernels: (name, registers, spilled bytes, shared bytes) of our own kernels;
            CUDA only.
        refused: what the kernel says that it cannot do; that is no failure.
        notes: what is wrong with it, in words; empty when nothing is.
    """

    target: str
    model: str
    program: str
    seconds: float = 0.0
    argument_bytes: int = 0
    temporary_bytes: int = 0
    kernels: list = field(default_factory=list)
    refused: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        if self.refused:
            return "refused: " + self.refused
        return "ok" if not self.notes else "FAIL: " + "; ".join(self.notes)


def compile_tpu(only: str | None) -> Iterator[Row]:
    """Compiles for TPUs with libtpu; no TPU is touched."""
    from jax.experimental.topologies import get_topology_desc

    from experiments.shapes import mesh_of
    from pallas_kernels.backends import Kernels

    kernels = Kernels(prefill="mosaic_tpu", decode="mosaic_tpu")
    for target in TPU_TARGETS:
        if only not in (None, target.name):
            continue
        devices = get_topology_desc(target.topology, platform="tpu").devices
        for model, count in target.models:
            meshes = mesh_of(devices[:1]), mesh_of(devices[:count])
            for program in _programs(model, meshes, kernels):
                size = program.mesh.size
                name = target.name if size == 1 else f"{size} x {target.name}"
                yield _compile(program, name, model)


def compile_cuda(only: str | None) -> Iterator[Row]:
    """Compiles for one H200 with XLA, Triton and ptxas; no GPU is touched."""
    from jax.experimental.topologies import get_topology_desc

    from experiments.ptxas import kernel_reports
    from experiments.shapes import mesh_of
    from pallas_kernels.backends import Kernels

    topology = get_topology_desc(
        CUDA_TARGET.topology,
        platform="cuda",
        topology="1x1x1",
        target_config=H200_CONFIG,
    )
    mesh = mesh_of(topology.devices[:1])
    variants = [
        Kernels(prefill="triton", decode="triton"),
        Kernels(prefill="mosaic_gpu", decode="mosaic_gpu"),
        Kernels(prefill="cudnn", decode="triton"),
    ]
    for model, _ in CUDA_TARGET.models:
        for kernels in variants:
            if only not in (None, kernels.prefill):
                continue
            for program in _programs(model, (mesh, mesh), kernels):
                uses_decode = program.name.startswith("decode")
                if kernels.prefill == "cudnn" and uses_decode:
                    continue  # compiled with the first variant
                backend = kernels.decode if uses_decode else kernels.prefill
                row = _compile(program, f"H200 {backend}", model)
                row.kernels = kernel_reports()
                for name, _, spilled, _ in row.kernels:
                    if spilled:
                        row.notes.append(f"{name} spills {spilled} bytes")
                yield row


def _programs(model: str, meshes: "tuple[Mesh, Mesh]", kernels) -> "Iterator[Program]":
    from experiments.programs import kernel_programs, model_programs
    from experiments.shapes import shapes

    one, all_devices = meshes
    if model != "llama-2-70b":  # its kernels are those of llama-3-8b
        for page_tokens in (16, 64, 256):
            at = shapes(model, one, kernels, page_tokens=page_tokens)
            yield from kernel_programs(at)
    at = shapes(model, all_devices, kernels, page_tokens=64)
    yield from model_programs(at)


def _compile(program: "Program", target: str, model: str) -> Row:
    import jax

    row = Row(target=target, model=model, program=program.name)
    start = perf_counter()
    try:
        with jax.set_mesh(program.mesh):
            jitted = jax.jit(program.function, donate_argnums=program.donated)
            compiled = jitted.lower(*program.arguments).compile()
    except NotImplementedError as error:
        row.refused = str(error)
        return row
    except Exception as error:  # whatever a compiler may raise is the row's news
        row.notes.append(str(error).strip().splitlines()[0][:200])
        return row
    finally:
        row.seconds = perf_counter() - start
    memory = compiled.memory_analysis()
    assert memory is not None, "both compilers report memory"
    row.argument_bytes = memory.argument_size_in_bytes
    row.temporary_bytes = memory.temp_size_in_bytes
    if row.temporary_bytes >= program.pool_bytes:
        row.notes.append(f"temporaries reach a pool, {program.pool_bytes >> 20} MiB")
    elif row.temporary_bytes > program.activation_bytes:
        row.notes.append(
            f"temporaries above the model's own, {program.activation_bytes >> 20} MiB"
        )
    return row


def prepare(platform: str) -> None:
    """Environment that must stand before jax is imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if platform == "tpu":
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"
        os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-4"
        os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
    else:
        from experiments.ptxas import dump_flags

        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
        folder = tempfile.mkdtemp(prefix="cachedattn-ptx-")
        flags = os.environ.get("XLA_FLAGS", ""), dump_flags(folder)
        os.environ["XLA_FLAGS"] = " ".join(flags).strip()


def _cells(row: Row, platform: str) -> list[str]:
    cells = [
        row.target,
        row.model,
        row.program,
        f"{row.seconds:.1f}",
        f"{row.argument_bytes / MIB:,.0f}",
        f"{row.temporary_bytes / MIB:,.1f}",
    ]
    if platform == "cuda":
        cells.append(
            ", ".join(f"{n}: {r}/{s}/{b >> 10}" for n, r, s, b in row.kernels) or "-"
        )
    return [*cells, row.verdict]


_HEADER = ["target", "model", "program", "compile s", "arguments MiB", "temporary MiB"]
_CUDA_HEADER = "kernel: registers/spilled bytes/shared KiB"


def main(argv: list[str]) -> int:
    """`python -m experiments.ahead_of_time tpu [--only NAME] [--markdown FILE]`."""
    import argparse

    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    parser = argparse.ArgumentParser(
        prog="python -m experiments.ahead_of_time",
        description=str(__doc__).split("\n")[0],
    )
    parser.add_argument("platform", choices=["tpu", "cuda"])
    parser.add_argument("--only", help="a chip (v5e, v6e, v5p) or a CUDA backend")
    parser.add_argument("--markdown", type=Path, help="also write the table there")
    options = parser.parse_args(argv)
    platform = options.platform
    prepare(platform)
    console = Console(width=None if sys.stdout.isatty() else 200)
    rows = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("compiling", total=None)
        compiled = {"tpu": compile_tpu, "cuda": compile_cuda}[platform](options.only)
        for row in compiled:
            rows.append(row)
            progress.update(task, description=f"{row.target} {row.model} {row.program}")
    header = [*_HEADER, *([_CUDA_HEADER] if platform == "cuda" else []), "verdict"]
    table = Table(*header)
    for row in rows:
        table.add_row(*_cells(row, platform))
    console.print(table)
    if options.markdown:
        lines = [header, ["---"] * len(header), *(_cells(r, platform) for r in rows)]
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        options.markdown.write_text(text + "\n")
    failed = sum(1 for row in rows if row.notes)
    console.print(f"{len(rows)} programs, {failed} failed")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
