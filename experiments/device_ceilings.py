"""The ceilings of a device: what its memory, its products and its links do at best.

    cachedattn run configs/h200.gin --gin_bindings 'device.run.only = ("ceilings",)'

Everything else that is measured on a device is held against these, measured in the
same run. No page, model or engine takes part.
"""

import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from cachedattn_jax.run_directory import RunDirectory
from experiments.deadline import Deadline

DIRECTIONS = (
    "pinned to device",
    "device to pinned",
    "both at once, each",
    "NumPy to device",
    "NumPy to pinned",
)
_PIECE_BYTES = 64 << 20  # of a file, written and read at a time


def run(
    run_directory: RunDirectory,
    *,
    copy_bytes: int = 4 << 30,
    product_size: int = 8192,
    link_bytes: Sequence[int] = (1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20),
    total_bytes: int = 1 << 30,
    disk_bytes: int = 4 << 30,
    disk_root: str | None = None,
    seconds: float = math.inf,
) -> dict:
    """Measures the default device, its links to host memory, and a disk.

    Args:
        copy_bytes, product_size: size of the array copied and of the square matrices
            multiplied.
        link_bytes: sizes of the blocks that are copied between memories.
        total_bytes: copied at each of these sizes, at most 64 blocks.
        disk_bytes, disk_root: size of the file written and read, and where; None for
            the run directory.
        seconds: that it may take; what would take longer is left out.
    """
    console, deadline = Console(), Deadline(seconds)
    rows = [
        link_rates(size, total_bytes) for size in deadline.over(link_bytes, "blocks of")
    ]
    first, again = first_touch_rates(total_bytes)
    run_directory.open()
    found = {
        "device": jax.devices()[0].device_kind,
        "copy_bytes_s": copy_rate(copy_bytes),
        "product_flops_s": product_rate(product_size),
        "links": rows,
        "pinned_first_touch_bytes_s": first,
        "pinned_again_bytes_s": again,
        "disk": disk_rates(disk_bytes, disk_root or str(run_directory.path)),
        "left_out": deadline.left_out,
        "claims": [],
    }
    table = Table(title="Links, GB/s by block", title_justify="left")
    for name in ("MiB", *DIRECTIONS):
        table.add_column(name, justify="right")
    for row in rows:
        rates = [f"{row['bytes_s'][name] / 1e9:.1f}" for name in DIRECTIONS]
        table.add_row(f"{row['block_bytes'] / 2**20:g}", *rates)
    console.print(table)
    console.print(
        f"copy {found['copy_bytes_s'] / 1e9:,.0f} GB/s, product"
        f" {found['product_flops_s'] / 1e12:,.0f} TFLOP/s, disk"
        f" { {k: f'{v / 1e9:.2f}' for k, v in found['disk'].items()} } GB/s, pinned"
        f" memory {first / 1e9:.1f} GB/s at first and {again / 1e9:.1f} again",
        highlight=False,
    )
    return found


def copy_rate(num_bytes: int) -> float:
    """Bytes a second, read and written, of the best of several passes."""
    x = jnp.arange(num_bytes // 4, dtype=jnp.uint32)
    flip = jax.jit(lambda x: x ^ jnp.uint32(1), donate_argnums=0)
    x = jax.block_until_ready(flip(x))
    rates = []
    for _ in range(3):
        started = time.perf_counter()
        for _ in range(10):
            x = flip(x)
        jax.block_until_ready(x)
        rates.append(10 * 2 * num_bytes / (time.perf_counter() - started))
    return max(rates)


def product_rate(size: int) -> float:
    """Operations a second of a square bfloat16 product of random numbers."""
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), jnp.bfloat16)
    multiply = jax.jit(jnp.matmul)
    return 2 * size**3 / best_s(multiply, a, b)


def best_s(function: Callable, *arguments, calls: int = 10) -> float:
    """The best of three means over calls that are all dispatched before the wait."""
    jax.block_until_ready(function(*arguments))
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        results = [function(*arguments) for _ in range(calls)]
        jax.block_until_ready(results)
        best = min(best, (time.perf_counter() - started) / calls)
    return best


def pinned_rate(num_bytes: int = 256 << 20) -> float:
    """Bytes a second from pinned memory to the device in large blocks."""
    return link_rates(num_bytes, 4 * num_bytes)["bytes_s"]["pinned to device"]


def link_rates(block_bytes: int, total_bytes: int) -> dict:
    """Rates of blocks that are all handed over before the wait, by direction."""
    count = max(1, min(64, total_bytes // block_bytes))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    pinned = device.with_memory_kind("pinned_host")
    rng = np.random.default_rng(0)
    # An array of bytes for each block: a block that comes again may be in a cache.
    words = max(1, block_bytes // 8)
    arrays = [
        rng.integers(0, 2**63, words, np.int64).view(np.uint8) for _ in range(count)
    ]
    on_host = jax.block_until_ready(jax.device_put(arrays, pinned))
    on_device = jax.block_until_ready(jax.device_put(arrays, device))

    def rate(*moves: tuple[list, jax.sharding.Sharding]) -> float:
        seconds = []
        for _ in range(4):
            started = time.perf_counter()
            jax.block_until_ready([jax.device_put(*move) for move in moves])
            seconds.append(time.perf_counter() - started)
        return count * block_bytes / min(seconds[1:])

    down, up = (on_host, device), (on_device, pinned)
    rates = [rate(down), rate(up), rate(down, up)]
    rates += [rate((arrays, device)), rate((arrays, pinned))]
    return {
        "block_bytes": block_bytes,
        "num_blocks": count,
        "bytes_s": dict(zip(DIRECTIONS, rates, strict=True)),
    }


def first_touch_rates(num_bytes: int) -> tuple[float, float]:
    """Rates from the device into pinned memory that is new, and into the same again."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    x = jax.block_until_ready(jnp.ones(num_bytes, jnp.uint8, device=device))
    kept, rates = [], []
    for _ in range(6):  # more than the pool of pinned memory had before
        started = time.perf_counter()
        kept.append(jax.device_put(x, device.with_memory_kind("pinned_host")))
        jax.block_until_ready(kept[-1])
        rates.append(num_bytes / (time.perf_counter() - started))
    first = min(rates)
    kept.clear()
    started = time.perf_counter()
    jax.block_until_ready(jax.device_put(x, device.with_memory_kind("pinned_host")))
    return first, num_bytes / (time.perf_counter() - started)


def disk_rates(num_bytes: int, root: str) -> dict[str, float]:
    """Bytes a second of a large file: written and synced, read cold, read again."""
    piece = os.urandom(min(_PIECE_BYTES, num_bytes))
    count = max(1, num_bytes // len(piece))
    with tempfile.TemporaryDirectory(dir=root) as folder:
        path = Path(folder) / "file"
        started = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(count):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        rates = {"write": count * len(piece) / (time.perf_counter() - started)}
        for name in ("read", "read_again"):
            with path.open("rb", buffering=0) as file:
                if name == "read":
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                started = time.perf_counter()
                while file.read(len(piece)):
                    pass
                rates[name] = count * len(piece) / (time.perf_counter() - started)
    return rates
