"""Which page and which layer group suit a device: a sweep around the defaults.

For each size an engine serves the turn that sizes matter to: a history in pinned host
memory and few new tokens, once on an idle device (nothing was copied ahead) and once
behind another prefill. `Engine.calibrate` tells what a decode step takes.

    cachedattn run configs/h200_more.gin --gin_bindings 'device.run.only = ("sizes",)'

Expected: what `EngineConfig` takes by default is within 5 % of the best of the sweep.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from cachedattn_jax.engine.engine_config import EngineConfig
from cachedattn_jax.model.config import preset
from cachedattn_jax.model.llama import init_params
from cachedattn_jax.run_directory import Claim, RunDirectory
from cachedattn_jax.store.budget import StoreConfig
from experiments.bench import repeat
from experiments.deadline import Deadline
from experiments.preload_bench import AUTO, PreloadBench

_ALONE = "d = 0"


def run(
    run_directory: RunDirectory,
    *,
    model: str,
    window: int | None = None,
    dtype: str = "bfloat16",
    engine: EngineConfig,
    store: StoreConfig,
    sizes: Sequence[tuple[int, int]],
    default: tuple[int, int],
    history: int = 6144,
    new: int = 128,
    repeats: int = 3,
    seed: int = 0,
    seconds: float = math.inf,
) -> dict:
    """Measures every size.

    Args:
        sizes: (page_tokens, layers_per_group).
        default: the sizes that are taken by default on this platform.
        seconds: that it may take; what would take longer is left out.
    """
    deadline = Deadline(seconds)
    overrides = {} if window is None else {"window": window}
    config = preset(model, dtype=dtype, **overrides)
    params = init_params(config, seed)
    rows = []
    for page_tokens, layers_per_group in deadline.over(sizes, "size"):
        cut = dataclasses.replace(
            engine, page_tokens=page_tokens, layers_per_group=layers_per_group
        )
        bench = PreloadBench(
            config, params, cut, [_ALONE, AUTO], history, new, store, seed
        )
        try:
            rows.append(
                {"size": [page_tokens, layers_per_group], **_row(bench, repeats)}
            )
        finally:
            bench.close()
    _print(model, rows)
    return {
        "model": model,
        "history_tokens": history,
        "new_tokens": new,
        "rows": rows,
        "left_out": deadline.left_out,
        "claims": _claims(rows, default),
    }


def _row(bench: PreloadBench, repeats: int) -> dict:
    engine = bench.engines[AUTO]
    constants = engine.calibrate()
    trials = {
        mode: functools.partial(_prefill_s, bench, mode)
        for mode in (_ALONE, AUTO, "all")
    }
    size = f"pages of {engine.store.layout.page_tokens} tokens"
    groups = f"{engine.store.layout.layers_per_group} layers a group"
    times = repeat(trials, repeats, f"{size}, {groups}")
    alone, behind, compute = (statistics.median(times[mode]) for mode in trials)
    return {
        "alone_s": alone,
        "behind_s": behind,
        "compute_s": compute,
        "decode_step_s": constants.decode_step_s,
        "host_to_device_bytes_s": constants.host_to_device.bytes_per_s,
    }


def _prefill_s(bench: PreloadBench, mode: str) -> float:
    return bench.turn(mode, None).prefill_s or 0.0


def _claims(rows: Sequence[dict], default: tuple[int, int]) -> list[Claim]:
    ours = next((row for row in rows if row["size"] == list(default)), None)
    names = {
        "alone_s": "first token of a lone turn",
        "behind_s": "first token behind another turn",
        "decode_step_s": "a decode step",
    }
    return [
        Claim(
            name=f"{name}: the default sizes over the best",
            value=ours[key] / min(row[key] for row in rows) if ours else None,
            target=1.05,
            comparison="<=",
            unit="x",
        )
        for key, name in names.items()
    ]


def _print(model: str, rows: Sequence[dict]) -> None:
    table = Table(title=f"{model}: sizes, times in ms", title_justify="left")
    names = ("page", "layers a group", "alone", "behind", "compute", "decode", "GB/s")
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        keys = ("alone_s", "behind_s", "compute_s", "decode_step_s")
        table.add_row(
            *map(str, row["size"]),
            *[f"{1e3 * row[key]:.1f}" for key in keys],
            f"{row['host_to_device_bytes_s'] / 1e9:.1f}",
        )
    Console().print(table)
