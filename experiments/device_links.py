"""Claim: over a real link, loading a history beats computing it again.

Fig. 18 of the paper on the machine's own link: at each point the same turn is served
with its history loaded from pinned host memory, computed again, as the engine decides,
and found on the device. The bound beside it is the bytes over the best rate from pinned
memory, or the turn with its history on the device, whichever is longer.

    cachedattn run configs/h200.gin --gin_bindings 'device.run.only = ("reuse_8b",)'

Expected on an H200 for Llama-3-8B: 90 % less time to the first token at 8K tokens of
history and 128 new ones; the decision within 5 % of the better of both.
"""

import math
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from cachedattn_jax.engine.engine_config import EngineConfig
from cachedattn_jax.model.config import preset
from cachedattn_jax.model.llama import init_params
from cachedattn_jax.run_directory import Claim, RunDirectory
from cachedattn_jax.store.budget import StoreConfig
from experiments.deadline import Deadline
from experiments.device_ceilings import pinned_rate
from experiments.recompute_or_load import RESIDENT, WAYS, point, ways

_NAMES = (*WAYS, RESIDENT)


def run(
    run_directory: RunDirectory,
    *,
    model: str,
    window: int,
    engine: EngineConfig,
    store: StoreConfig,
    points: Sequence[tuple[int, int]],
    claim: tuple[int, int] = (8192, 128),
    target: float = 0.9,
    pinned_bytes: int = 256 << 20,
    repeats: int = 3,
    seed: int = 0,
    seconds: float = math.inf,
) -> dict:
    """Serves every point in every way.

    Args:
        points: (tokens of history, new tokens).
        claim: the point whose reduction of the time to first token is held against
            `target`.
        pinned_bytes: of a block that measures the link.
        seconds: that it may take; what would take longer is left out.
    """
    deadline = Deadline(seconds)
    config = preset(model, dtype="bfloat16", window=window)
    rng = np.random.default_rng(seed)
    engines = ways(config, init_params(config, seed), engine, store)
    try:
        layout = engines["load"].store.layout
        rows = [
            {
                **point(engines, rng, history, new, repeats, names=_NAMES),
                "load_bytes": layout.num_pages(history) * layout.page_bytes,
            }
            for history, new in deadline.over(points, "point")
        ]
        constants = engines["decided"].cost_model.constants
    finally:
        for served in engines.values():
            served.close()
    pinned = pinned_rate(pinned_bytes)
    for row in rows:
        took = row["seconds"]
        bound = max(row["load_bytes"] / pinned, took[RESIDENT])
        row["bound_s"] = bound
        row["reduction"] = 1 - took["decided"] / took["recompute"]
        row["reduction_bound"] = 1 - bound / took["recompute"]
        row["reduction_on_device"] = 1 - took[RESIDENT] / took["recompute"]
    _print(model, rows)
    return {
        "model": model,
        "pinned_bytes_s": pinned,
        "constants": constants.describe() if constants else None,
        "rows": rows,
        "left_out": deadline.left_out,
        "claims": _claims(rows, claim, target),
    }


def _claims(rows: Sequence[dict], claim: tuple[int, int], target: float) -> list[Claim]:
    at = [row for row in rows if (row["history"], row["new"]) == tuple(claim)]
    regrets = [row["regret"] for row in rows]
    name = f"TTFT reduction, {claim[0]} of history, {claim[1]} new"
    return [
        Claim(
            name=f"{name}, from host memory",
            value=at[0]["reduction"] if at else None,
            target=target,
        ),
        Claim(
            name=f"{name}, on the device",
            value=at[0]["reduction_on_device"] if at else None,
            target=target,
        ),
        Claim(
            name="mean regret against the better of load and recompute",
            value=float(np.mean(regrets)),
            target=0.05,
            comparison="<=",
        ),
        Claim(name="worst regret", value=max(regrets), target=0.20, comparison="<="),
    ]


def _print(model: str, rows: Sequence[dict]) -> None:
    table = Table(title=f"{model}: time to first token, ms", title_justify="left")
    columns = ("history", "new", *_NAMES, "bound", "less time", "of", "decision")
    for name in columns:
        table.add_column(name, justify="left" if name == "decision" else "right")
    for row in rows:
        table.add_row(
            str(row["history"]),
            str(row["new"]),
            *[f"{1e3 * row['seconds'][name]:.1f}" for name in _NAMES],
            f"{1e3 * row['bound_s']:.1f}",
            f"{row['reduction']:.1%}",
            f"{row['reduction_bound']:.1%}",
            row["decision"],
        )
    Console().print(table)
