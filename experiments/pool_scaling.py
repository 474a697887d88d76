"""Claim: a step costs the same however many slots the pool has.

The pool is updated in place or this fails: a copy of it would grow with the slots.
Times one decode step and one prefill of every program size on a pool that just holds
the window, and on one of 16 times the slots, alternating.

    cachedattn run configs/pool_scaling.gin        2 CPU cores, under a minute

Expected: a ratio of at most 1.2 for every program.
"""

import statistics
import time

import jax
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cachedattn_jax.engine.decode import Decode, Row
from cachedattn_jax.engine.prefill import Prefill
from cachedattn_jax.engine.request import SamplingParams
from cachedattn_jax.engine.sampling import sampling_batch
from cachedattn_jax.model.config import preset
from cachedattn_jax.model.llama import init_params
from cachedattn_jax.run_directory import Claim, RunDirectory
from cachedattn_jax.store.device_pool import DevicePool
from cachedattn_jax.store.layout import Layout
from cachedattn_jax.store.watcher import Watcher
from pallas_kernels.rope import rope_tables


class _Programs:
    """The programs of one model on a pool of so many slots."""

    def __init__(self, config, params, layout, num_slots, num_seats, chunk_tokens):
        self.pool = DevicePool(layout, num_slots, jax.devices()[0])
        self.num_pages = layout.num_pages(config.window)
        rope = rope_tables(
            config.inverse_frequencies(),
            page_tokens=layout.page_tokens,
            num_pages=self.num_pages,
        )
        self.prefill = Prefill(
            config,
            params,
            rope,
            self.pool,
            chunk_tokens=chunk_tokens,
            puts_first=True,
            watcher=Watcher("compute"),
        )
        self.decode = Decode(
            config,
            params,
            rope,
            self.pool,
            num_seats=num_seats,
            pages_per_sequence=self.num_pages,
        )

    def time(self, program: str, size: int, context: int) -> float:
        """Seconds of one run."""
        pages = np.arange(self.num_pages, dtype=np.int32) % self.pool.num_slots
        started = time.perf_counter()
        if program == "decode":
            row = Row(
                seat=0, page_table=pages, length=context, sampling=SamplingParams()
            )
            self.decode.run([row] * size, size)
        else:
            run = self.prefill.begin(np.ones(size, np.int32), context, pages)
            run.advance()
            self.decode.last_tokens, _ = self.prefill.first_token(
                run, self.decode.last_tokens, 0, sampling_batch([], 1)
            )
        jax.block_until_ready((self.pool.arrays, self.decode.last_tokens))
        return time.perf_counter() - started


def run(
    run_directory: RunDirectory,
    *,
    model: str = "small",
    page_tokens: int = 16,
    factor: int = 16,
    num_seats: int = 8,
    chunk_tokens: tuple[int, ...] = (16, 64, 256),
    context: int = 300,
    repeats: int = 15,
    dtype: str = "float32",
) -> dict[str, object]:
    """Times every program on a small and on a large pool.

    Args:
        factor: slots of the large pool over those of the small one.
        context: tokens in the pages before the ones computed.
    """
    config = preset(model, dtype=dtype)
    params = init_params(config, 0)
    layout = Layout(
        num_layers=config.num_layers,
        layers_per_group=1,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        page_tokens=page_tokens,
        dtype=dtype,
        rope="",
        weights="",
    )
    least = layout.num_pages(config.window)
    pools = [
        _Programs(config, params, layout, slots, num_seats, tuple(chunk_tokens))
        for slots in (least, factor * least)
    ]
    names = [("decode", size) for size in pools[0].decode.batch_sizes]
    names += [("prefill", size) for size in chunk_tokens]
    rows = []
    for program, size in track(names, "timing programs"):
        times = [
            [pool.time(program, size, context) for pool in pools]
            for _ in range(repeats + 2)
        ][2:]
        small, large = (
            statistics.median(column) for column in zip(*times, strict=True)
        )
        rows.append(
            {"program": f"{program} {size}", "small_s": small, "large_s": large}
        )
    _print(rows, least, factor)
    claims = [
        Claim(
            name=f"{row['program']}: time with {factor}x the slots",
            value=row["large_s"] / row["small_s"],
            target=1.2,
            comparison="<=",
            unit="x",
        )
        for row in rows
    ]
    return {"programs": rows, "slots": [least, factor * least], "claims": claims}


def _print(rows: list[dict], least: int, factor: int) -> None:
    table = Table(title="Median time of a program, ms", title_justify="left")
    for name in ("program", f"{least} slots", f"{factor * least} slots", "ratio"):
        table.add_column(name, justify="left" if name == "program" else "right")
    for row in rows:
        small, large = row["small_s"], row["large_s"]
        table.add_row(
            row["program"],
            f"{1e3 * small:.2f}",
            f"{1e3 * large:.2f}",
            f"{large / small:.2f}",
        )
    Console().print(table)
