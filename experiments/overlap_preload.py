"""Claim: layer-wise pre-loading costs what the pipeline bound says, and no more.

A conversation whose history lies in host memory takes a turn while another prefill
still runs. Its layer groups are copied to the device over an emulated link whose speed
makes the loading take 0.5, 1 and 2 times as long as the computing; `read_buffer` groups
may be copied before its own prefill starts (paper, section 3.2.1 and Fig. 19).

    cachedattn run configs/overlap_preload.gin        2 CPU cores, about 3 minutes

Expected, as in the paper: without pre-loading, loading and computing add up; with it
and an empty buffer, the longer of the two is left, plus a group of the other; every
group in the buffer takes one group's loading off, until only the computing is left (the
paper: -35 % with an empty buffer, -61 % with 15 of 40 layers).
"""

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from cachedattn_jax.engine.engine import Engine
from cachedattn_jax.engine.engine_config import EngineConfig
from cachedattn_jax.gantt import draw_turn
from cachedattn_jax.model.config import preset
from cachedattn_jax.model.llama import init_params
from cachedattn_jax.run_directory import Claim, RunDirectory
from cachedattn_jax.store.budget import StoreConfig
from experiments.deadline import Deadline
from experiments.device_ceilings import pinned_rate
from experiments.preload_bench import AUTO, NO_PRELOAD, PreloadBench
from experiments.preload_rows import measure
from experiments.report import write_report


def run(
    run_directory: RunDirectory,
    *,
    model: str = "small",
    window: int | None = None,
    engine: EngineConfig = EngineConfig(),
    store: StoreConfig = StoreConfig(write_policy="write_back"),
    history: int = 512,
    new: int = 1024,
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0),
    dtype: str = "float32",
    depths: tuple[int, ...] = (0, 1, 2, 4),
    other_order: str | None = None,
    repeats: int = 11,
    seed: int = 0,
    seconds: float = math.inf,
) -> dict[str, object]:
    """Measures every depth of the read buffer at every ratio of load to compute.

    Args:
        store: of each engine; saving is another experiment, so nothing is saved early.
        history, new: tokens in host memory and tokens to compute.
        ratios: load time over compute time; none to measure the machine's own link.
        window: of the model, if not the preset's.
        depths: sizes of the read buffer, in layer groups.
        other_order: an `EngineConfig.put_order` that every depth is measured with, too.
        seconds: that it may take; what would take longer is left out.
    """
    deadline = Deadline(seconds)
    overrides = {} if window is None else {"window": window}
    config = preset(model, dtype=dtype, **overrides)
    buffers = [*[f"d = {depth}" for depth in depths], AUTO]
    modes = [NO_PRELOAD, *buffers]
    if other_order is not None:
        modes += [f"{buffer}, {other_order}" for buffer in buffers]
    bench = PreloadBench(
        config, init_params(config, seed), engine, modes, history, new, store, seed
    )
    try:
        rows = measure(bench, modes, ratios, repeats, deadline)
        figures = {"Time to first token": _plot(rows)}
        served = bench.engines[AUTO]
        run_directory.write_timeline(served.timeline.chrome_trace())
        figures["One turn, layer group by layer group"] = draw_turn(
            served.timeline.events, _last_turn(served)
        )
    finally:
        bench.close()
    summary = {
        "model": model,
        "history_tokens": history,
        "new_tokens": new,
        "layer_groups": bench.num_groups,
        "rows": rows,
        "left_out": deadline.left_out,
        "claims": _claims(rows) + _order_claims(rows, other_order),
    }
    if not ratios:
        pinned = pinned_rate()
        summary["pinned_bytes_s"] = pinned
        (alone,) = [row for row in rows if row["mode"] == NO_PRELOAD]
        summary["claims"].append(
            Claim(
                name="host to device over the best rate from pinned memory",
                value=bench.load_bytes / alone["load_s"] / pinned,
                target=0.85,
            )
        )
    _print(rows)
    write_report(
        run_directory, f"Pre-loading, {rows[0]['kind']} link", summary, figures
    )
    return summary


def _claims(rows: Sequence[dict]) -> list[Claim]:
    claims = []
    ratios, kind = _ratios(rows), rows[0]["kind"]
    for ratio in ratios:
        of_ratio = [row for row in rows if row["load_over_compute"] == ratio]
        preloaded = [
            row
            for row in of_ratio
            if row["mode"] != NO_PRELOAD and ", " not in row["mode"]
        ]
        claims.append(
            Claim(
                name=f"load {ratio:.3g}x compute: time over pipeline bound, worst d",
                value=max(row["over_bound"] for row in preloaded),
                target=1.10,
                comparison="<=",
                unit="x",
                kind=kind,
            )
        )
        claims += [
            Claim(
                name=f"load {ratio:.3g}x compute: no pre-load over load + compute",
                value=row["over_bound"],
                target=1.0,
                unit="x",
                kind=kind,
            )
            for row in of_ratio
            if row["mode"] == NO_PRELOAD
        ]
    least = min(ratios)
    (auto,) = [
        row for row in rows if row["mode"] == AUTO and row["load_over_compute"] == least
    ]
    claims.append(
        Claim(
            name=f"load {least:.3g}x compute, d = auto: exposed stall over load time",
            value=auto["stall_share"],
            target=0.05,
            comparison="<=",
            kind=kind,
        )
    )
    return claims


def _order_claims(rows: Sequence[dict], other: str | None) -> list[Claim]:
    """The order of the platform against another one, over all sizes of the buffer."""
    if other is None:
        return []
    walls = {(row["mode"], row["load_over_compute"]): row["wall_s"] for row in rows}
    quotients = [
        wall / walls[f"{mode}, {other}", ratio]
        for (mode, ratio), wall in walls.items()
        if (f"{mode}, {other}", ratio) in walls
    ]
    return [
        Claim(
            name=f"time with the platform's order over that of {other}, mean",
            value=float(np.mean(quotients)),
            target=1.02,
            comparison="<=",
            unit="x",
            kind=rows[0]["kind"],
        )
    ]


def _ratios(rows: Sequence[dict]) -> list[float]:
    return list(dict.fromkeys(row["load_over_compute"] for row in rows))


def _last_turn(engine: Engine) -> str:
    names = [event.details.get("turn") for event in engine.timeline.events]
    return [str(name) for name in names if str(name).startswith("ours")][-1]


def _print(rows: Sequence[dict]) -> None:
    table = Table(
        title=f"Prefill time in ms, {rows[0]['kind']} link (medians)",
        title_justify="left",
    )
    for name in (
        "load / compute",
        "read buffer",
        "compute",
        "load",
        "prefill",
        "bound",
        "over bound",
        "stall",
    ):
        table.add_column(name, justify="left" if name == "read buffer" else "right")
    for row in rows:
        times = (row[k] for k in ("compute_s", "load_s", "wall_s", "bound_s"))
        table.add_row(
            f"{row['load_over_compute']:.3g}",
            row["mode"],
            *[f"{1e3 * value:.1f}" for value in times],
            f"{row['over_bound']:.3f}",
            f"{1e3 * row['exposed_stall_s']:.1f}",
        )
    Console().print(table)


def _plot(rows: Sequence[dict]) -> Figure:
    """Fig. 19 of the paper, a panel for each ratio: measured bars and bound lines."""
    ratios = _ratios(rows)
    figure, panels = plt.subplots(
        1,
        len(ratios),
        figsize=(3 * len(ratios), 3.2),
        sharey=True,
        layout="constrained",
    )
    for axes, ratio in zip(np.atleast_1d(panels), ratios, strict=True):
        of_ratio = [row for row in rows if row["load_over_compute"] == ratio]
        names = [row["mode"] for row in of_ratio]
        places = np.arange(len(names))
        axes.bar(places, [1e3 * row["wall_s"] for row in of_ratio], label="measured")
        axes.hlines(
            [1e3 * row["bound_s"] for row in of_ratio],
            places - 0.4,
            places + 0.4,
            color="black",
            label="bound",
        )
        axes.set_title(f"load = {ratio:.3g} x compute", fontsize=10)
        axes.set_xticks(places, names, rotation=60, ha="right")
    np.atleast_1d(panels)[0].set_ylabel("time to first token, ms")
    np.atleast_1d(panels)[0].legend()
    return figure
