"""Prefills that load their history, timed against the bound that loading and computing
set them.

Knows rounds, medians and the pipeline's bound. Does not know what is claimed of them.
"""

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cachedattn_jax.engine.pipeline import least_finish_s, no_preload_s
from cachedattn_jax.store.link import EmulatedLink
from experiments.bench import repeat
from experiments.deadline import Deadline
from experiments.preload_bench import AUTO, NO_PRELOAD, PreloadBench


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """One turn: times in seconds."""

    wall_s: float
    load_s: float
    stall_s: float


def measure(
    bench: PreloadBench,
    modes: Sequence[str],
    ratios: Sequence[float],
    repeats: int,
    deadline: Deadline,
) -> list[dict]:
    """A row for every mode and ratio; medians over the repeats."""
    compute = repeat(
        {"compute": lambda: bench.turn("all", None).prefill_s or 0.0},
        repeats,
        "computing alone",
        deadline,
    )["compute"]
    compute_s = statistics.median(compute)
    rows = []
    for ratio in ratios or (None,):
        link = None
        if ratio is not None:
            link = EmulatedLink(bytes_per_s=bench.load_bytes / (ratio * compute_s))
        auto = bench.engines[AUTO]
        auto.store.links.emulate(link, None)
        auto.calibrate()
        details: dict[str, list[_Measured]] = {mode: [] for mode in modes}

        def trial(mode: str, link=link, details=details) -> float:
            turn = bench.turn(mode, link)
            measured = _Measured(
                wall_s=turn.prefill_s or 0.0,
                load_s=turn.load_s,
                stall_s=turn.exposed_stall_s,
            )
            details[mode].append(measured)
            return measured.wall_s

        trials: dict[str, Callable[[], float]] = {
            mode: functools.partial(trial, mode) for mode in modes
        }
        trials["all"] = lambda: bench.turn("all", None).prefill_s or 0.0
        what = "real link" if ratio is None else f"load {ratio:g} x compute"
        walls = repeat(trials, repeats, what, deadline)
        # Where nothing overlaps, what it takes is the load alone.
        load_s = statistics.median(d.load_s for d in details[NO_PRELOAD][1:])
        if ratio is not None:
            load_s = ratio * compute_s
        for mode in modes:
            row = _row(bench, mode, load_s, walls, details[mode][1:])
            row["load_over_compute"] = ratio or load_s / row["compute_s"]
            row["kind"] = "measured" if ratio is None else "emulated"
            rows.append(row)
    return rows


def _row(
    bench: PreloadBench,
    mode: str,
    load_s: float,
    walls: Mapping[str, Sequence[float]],
    details: Sequence[_Measured],
) -> dict:
    """Wall time against the bound made of the computing of the same round.

    Times are medians; so is the ratio, of those of the rounds: a machine that changes
    its speed between rounds (by 1.5 where others share it) changes both sides of it.
    """
    wall_s, compute_s = (statistics.median(walls[name]) for name in (mode, "all"))
    bounds_s = [_bound_s(mode, bench.num_groups, load_s, s) for s in walls["all"]]
    over_bound = statistics.median(
        wall / bound for wall, bound in zip(walls[mode], bounds_s, strict=True)
    )
    return {
        "mode": mode,
        "compute_s": compute_s,
        "load_s": load_s,
        "wall_s": wall_s,
        "bound_s": statistics.median(bounds_s),
        "over_bound": over_bound,
        "exposed_stall_s": statistics.median(d.stall_s for d in details),
        "stall_share": statistics.median(d.stall_s / d.load_s for d in details),
    }


def _bound_s(mode: str, num_groups: int, load_s: float, compute_s: float) -> float:
    load = [load_s / num_groups] * num_groups
    compute = [compute_s / num_groups] * num_groups
    buffer = mode.partition(", ")[0]
    if buffer == NO_PRELOAD:
        return no_preload_s(load, compute)
    depth = num_groups if buffer == AUTO else int(buffer.removeprefix("d = "))
    return least_finish_s(load, compute, read_ahead=depth)
