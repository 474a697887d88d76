"""Claim: where the queue says little, learnt return times find what LRU loses.

The paper's queue never empties, so that the queue itself says who comes next. Here a
machine keeps up with 70 % load: next to nobody waits, and a policy has to guess who of
the idle comes back. Every row of the table stands between two bounds: Belady's, which
sees the future, and the blind optimum, the best fixed time to keep for each class of
conversations (see `experiments.blind_optimum`).

    cachedattn run configs/short_queues.gin            2 CPU cores, about 10 minutes
    cachedattn run configs/mooncake_placement.gin      2 CPU cores, about 2 minutes

Expected: `predictive` at least 95 % of the blind optimum where LRU hits 50 to 70 % of
returning turns, some points above LRU, and nowhere below look-ahead. Below the table:
what memory of the device, the choice to recompute, `close()`, and giving up pages
instead of whole sessions bring, at the tightest capacity.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from cachedattn_jax.run_directory import Claim, RunDirectory
from cachedattn_jax.simulator.hardware import MODELS
from cachedattn_jax.simulator.simulation import Simulation
from experiments.blind_optimum import blind_optimum, idle_times
from experiments.jobs import run_jobs
from experiments.queue_setting import QueueSetting
from experiments.report import write_report

POLICIES = ("lru", "fifo", "lookahead", "predictive", "belady")
_GB = 10**9


@dataclass(frozen=True, kw_only=True)
class Played:
    """One row.

    Attributes:
        hit, hit_device, hit_host, hit_disk: percent of returning turns.
        hit_tokens: percent of history tokens.
        blind: percent of returning turns that the blind optimum hits; None where it
            was not asked for.
        num_ahead: turns in the queue as a turn comes, by Little's law.
    """

    hit: float
    hit_device: float
    hit_host: float
    hit_disk: float
    hit_tokens: float
    ttft_s: dict[str, float]
    recomputed_tokens: float
    num_ahead: float
    blind: float | None
    cpu_s: float


def run(
    run_directory: RunDirectory,
    *,
    settings: Mapping[str, QueueSetting],
    capacities_gb: Mapping[str, tuple[float, ...]],
    over_lru: Mapping[str, float],
    device_gb: float = 40.0,
    num_processes: int = 2,
) -> dict[str, object]:
    """Plays every policy at every capacity of every workload, and the extras.

    Args:
        settings: workloads by name.
        capacities_gb: of host memory and disk together, by the same names; the first
            is the tightest.
        over_lru: points that `predictive` should bring there, by the same names.
        device_gb: memory for finished turns on the device, for that extra.
    """
    if not set(settings) == set(capacities_gb) == set(over_lru):
        raise ValueError(
            f"settings, capacities_gb and over_lru name {sorted(settings)},"
            f" {sorted(capacities_gb)} and {sorted(over_lru)}: the same are needed"
        )
    jobs = {}
    for name, setting in settings.items():
        for number, capacity in enumerate(capacities_gb[name]):
            of = partial(play, setting, capacity * _GB)
            for policy in POLICIES:
                is_first = policy == "lru"
                jobs[name, capacity, policy] = partial(of, policy, with_blind=is_first)
            for policy in ("lru", "predictive"):
                jobs[name, capacity, f"{policy}, close()"] = partial(
                    of, policy, closes=True
                )
            if not number:
                device_bytes = int(device_gb * _GB)
                for what, extra in _extras(device_bytes).items():
                    jobs[name, capacity, what] = partial(of, **extra)
    rows: dict[tuple[str, float, str], Played] = run_jobs(jobs, "rows", num_processes)
    _print(rows)
    summary = {
        "settings": dict(settings),
        "rows": [
            {"workload": name, "capacity_gb": capacity, "policy": what, **vars(row)}
            for (name, capacity, what), row in rows.items()
        ],
        "claims": _claims(rows, capacities_gb, over_lru),
    }
    figures = {"Returning turns that hit": _plot(rows, capacities_gb)}
    write_report(run_directory, "Short queues", summary, figures)
    return summary


def play(
    setting: QueueSetting,
    capacity_bytes: float,
    policy: str = "predictive",
    *,
    closes: bool = False,
    with_blind: bool = False,
    **of_system,
) -> Played:
    """Simulates one row; see `QueueSetting.system`."""
    trace = setting.columns()
    system = setting.system(capacity_bytes, policy, **of_system)
    played = Simulation(trace, system, closes=closes).run()
    from_s, until_s = setting.measured_s
    window = played.between(from_s, until_s)
    blind = None
    if with_blind:
        model = MODELS[setting.model]
        idle = idle_times(
            trace,
            played.turns,
            kv_bytes=model.kv_bytes,
            window=model.window,
            from_s=from_s,
            until_s=until_s,
        )
        blind = 100 * blind_optimum(idle, capacity_bytes)

    def hit(tier: str | None = None, by: str = "turns") -> float:
        return 100 * window.hit_rate(tier, by=by, counts_first=False)

    return Played(
        hit=hit(),
        hit_device=hit("device"),
        hit_host=hit("host"),
        hit_disk=hit("disk"),
        hit_tokens=hit(by="tokens"),
        ttft_s=window.ttft(with_queue=True),
        recomputed_tokens=float(window["recomputed"].sum(dtype=np.float64)),
        num_ahead=float(window["queue_s"].sum()) / (until_s - from_s),
        blind=blind,
        cpu_s=played.cpu_s,
    )


def _extras(device_bytes: int) -> dict[str, dict]:
    """What else a store can do, by name; all of `predictive` but one."""
    return {
        "predictive, device memory": {"device_bytes": device_bytes},
        "lru, device memory": {"policy": "lru", "device_bytes": device_bytes},
        "predictive, load or recompute": {"is_deciding": True},
        "predictive, whole sessions": {"is_whole": True},
        "lru, whole sessions": {"policy": "lru", "is_whole": True},
        "predictive, turns": {"token_weight": 0.0},
        "predictive, tokens": {"token_weight": 1.0},
    }


def _claims(
    rows: Mapping[tuple[str, float, str], Played],
    capacities_gb: Mapping[str, tuple[float, ...]],
    over_lru: Mapping[str, float],
) -> list[Claim]:
    found = []
    for name, capacities in capacities_gb.items():
        for capacity in capacities:
            row = {
                what: played
                for (of, size, what), played in rows.items()
                if (of, size) == (name, capacity)
            }
            where = f"{name}, {capacity:g} GB"
            lru, ours = row["lru"], row["predictive"]
            if 50 <= lru.hit <= 70:
                share = 100 * ours.hit / (lru.blind or 100.0)
                what = f"{where}: predictive, of the blind optimum"
                found.append(_at_least(what, share, 95.0, "%"))
            if capacity == capacities[0]:
                what = f"{where}: predictive over LRU at {lru.hit:.0f} %"
                gain = ours.hit - lru.hit
                found.append(_at_least(what, gain, over_lru[name], "points"))
            behind = ours.hit - row["lookahead"].hit
            what = f"{where}: predictive over look-ahead"
            found.append(_at_least(what, behind, -0.5, "points"))
            closed = row["predictive, close()"].hit - row["lru, close()"].hit
            what = f"{where}: predictive over LRU, both with close()"
            found.append(_at_least(what, closed, 0.0, "points"))
    return found


def _at_least(name: str, value: float, target: float, unit: str) -> Claim:
    return Claim(name=name, value=value, target=target, unit=unit, kind="simulated")


def _print(rows: Mapping[tuple[str, float, str], Played]) -> None:
    table = Table(title="Returning turns, %", title_justify="left")
    for name in ("workload", "GB", "policy"):
        table.add_column(name, justify="right" if name == "GB" else "left")
    for name in ("hit", "device", "host", "disk", "tokens", "TTFT p50 s", "p99"):
        table.add_column(name, justify="right")
    for (name, capacity, what), row in rows.items():
        hits = (row.hit, row.hit_device, row.hit_host, row.hit_disk, row.hit_tokens)
        table.add_row(
            name,
            f"{capacity:g}",
            what,
            *[f"{hit:.1f}" for hit in hits],
            f"{row.ttft_s['p50']:.3f}",
            f"{row.ttft_s['p99']:.2f}",
        )
        if row.blind is not None:
            table.add_row(name, f"{capacity:g}", "blind optimum", f"{row.blind:.1f}")
    Console(width=max(110, Console().width)).print(table)


def _plot(
    rows: Mapping[tuple[str, float, str], Played],
    capacities_gb: Mapping[str, tuple[float, ...]],
) -> Figure:
    """A panel for each workload: hits of every policy, and the two bounds."""
    figure, panels = plt.subplots(
        1,
        len(capacities_gb),
        figsize=(4 * len(capacities_gb), 3.6),
        squeeze=False,
        layout="constrained",
    )
    for axes, (name, capacities) in zip(panels[0], capacities_gb.items(), strict=True):
        for policy in POLICIES:
            hits = [rows[name, capacity, policy].hit for capacity in capacities]
            style = "k--" if policy == "belady" else "o-"
            axes.plot(capacities, hits, style, label=policy)
        blind = [rows[name, capacity, "lru"].blind for capacity in capacities]
        axes.plot(capacities, blind, "k:", label="blind optimum")
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("host memory and disk, GB")
    panels[0][0].set_ylabel("returning turns that hit, %")
    panels[0][0].legend()
    return figure
