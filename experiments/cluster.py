"""Claim: with many replicas, sending a session where its cache lies decides all.

N replicas, each with memory of its own and the same load; all turns of a session go to
one replica (affinity), or each turn to any. A random turn finds what its session left
on that replica long ago, the chance of which falls with N.

    cachedattn run configs/cluster.gin                 2 CPU cores, about 5 minutes

Expected: hits with affinity do not depend on N; at random they fall as 1 / N. Traffic
and memory of a replica are a tenth of what a GPU takes, so that 1,000 fit a laptop.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from cachedattn_jax.run_directory import Claim, RunDirectory
from cachedattn_jax.simulator.simulation import Routing, Simulation
from experiments.jobs import run_jobs
from experiments.queue_setting import QueueSetting
from experiments.report import write_report

ROUTINGS: tuple[Routing, ...] = ("affinity", "random")


@dataclass(frozen=True, kw_only=True)
class Served:
    """One cluster.

    Attributes:
        hit: percent of returning turns; a part of a history counts as that part.
        ttft_s: with the wait: mean, p50, p95, p99.
        imbalance: busy time of the busiest replica over the mean.
    """

    hit: float
    ttft_s: dict[str, float]
    imbalance: float
    num_turns: int
    cpu_s: float


def run(
    run_directory: RunDirectory,
    *,
    setting: QueueSetting = QueueSetting(),
    num_replicas: tuple[int, ...] = (1, 10, 100, 1000),
    sessions_per_replica: int = 60,
    hours: float = 1.0,
    capacity_gb: float = 4.0,
    num_processes: int = 2,
) -> dict[str, object]:
    """Plays every number of replicas with both ways of routing.

    Args:
        sessions_per_replica: that begin in so many hours. A cluster too small for
            the sessions of `setting` is played again with other seeds, not for longer:
            stores that fill for hours hit less than those that fill for one.
        capacity_gb: host memory and disk of a replica.
    """
    if not setting.is_generated:
        raise ValueError(f"trace={setting.trace!r} must be 'sharegpt', which can grow")
    if list(num_replicas) != sorted(set(num_replicas)) or len(num_replicas) < 2:
        raise ValueError(f"num_replicas={num_replicas} must be two or more that grow")
    jobs: dict[tuple[int, Routing], Callable[[], Served]] = {
        (count, routing): partial(
            serve,
            replace(setting, num_sessions=sessions_per_replica * count),
            count,
            routing,
            num_times=-(-setting.num_sessions // (sessions_per_replica * count)),
            capacity_bytes=capacity_gb * 1e9,
            sessions_per_s=sessions_per_replica * count / (3600 * hours),
        )
        for count in num_replicas
        for routing in ROUTINGS
    }
    rows: dict[tuple[int, Routing], Served] = run_jobs(jobs, "clusters", num_processes)
    _print(rows)
    summary = {
        "setting": setting,
        "rows": [
            {"num_replicas": count, "routing": routing, **vars(row)}
            for (count, routing), row in rows.items()
        ],
        "claims": _claims(rows, num_replicas),
    }
    figures = {"Hits by size of the cluster": _plot(rows, num_replicas)}
    write_report(run_directory, "Clusters", summary, figures)
    return summary


def serve(
    setting: QueueSetting,
    num_replicas: int,
    routing: Routing,
    *,
    num_times: int = 1,
    capacity_bytes: float,
    sessions_per_s: float,
) -> Served:
    """Simulates one cluster, several times with other seeds; means of all."""
    found = [
        _serve_once(
            replace(setting, seed=setting.seed + time),
            num_replicas,
            routing,
            capacity_bytes=capacity_bytes,
            sessions_per_s=sessions_per_s,
        )
        for time in range(num_times)
    ]
    return Served(
        hit=fmean(one.hit for one in found),
        ttft_s={
            name: fmean(one.ttft_s[name] for one in found) for name in found[0].ttft_s
        },
        imbalance=fmean(one.imbalance for one in found),
        num_turns=sum(one.num_turns for one in found),
        cpu_s=sum(one.cpu_s for one in found),
    )


def _serve_once(
    setting: QueueSetting,
    num_replicas: int,
    routing: Routing,
    *,
    capacity_bytes: float,
    sessions_per_s: float,
) -> Served:
    trace = setting.columns()
    # Think times stay.
    last_s = trace.num_sessions / sessions_per_s
    arrival_s = trace.arrival_s * (last_s / trace.arrival_s[-1])
    trace = replace(trace, arrival_s=arrival_s)
    played = Simulation(
        trace,
        setting.system(capacity_bytes),
        num_replicas=num_replicas,
        routing=routing,
        seed=setting.seed,
    ).run()
    window = played.between(setting.warm_up * last_s, last_s)
    busy = [one.prefill_s + one.decode_s for one in played.busy]
    return Served(
        hit=100 * window.hit_rate(counts_first=False),
        ttft_s=window.ttft(with_queue=True),
        imbalance=max(busy) / float(np.mean(busy)),
        num_turns=trace.num_turns,
        cpu_s=played.cpu_s,
    )


def _claims(
    rows: Mapping[tuple[int, Routing], Served], num_replicas: Sequence[int]
) -> list[Claim]:
    few, many = num_replicas[0], num_replicas[-1]
    return [
        Claim(
            name=f"affinity, {many} replicas: hits below those of {few}",
            value=rows[few, "affinity"].hit - rows[many, "affinity"].hit,
            target=5.0,
            comparison="<=",
            unit="points",
            kind="simulated",
        ),
        Claim(
            name=f"affinity over random routing, {many} replicas",
            value=rows[many, "affinity"].hit - rows[many, "random"].hit,
            target=20.0,
            unit="points",
            kind="simulated",
        ),
    ]


def _print(rows: Mapping[tuple[int, Routing], Served]) -> None:
    table = Table(title="Clusters", title_justify="left")
    table.add_column("replicas", justify="right")
    table.add_column("routing")
    for name in ("turns", "hit %", "TTFT p50 s", "p99", "busiest / mean", "CPU s"):
        table.add_column(name, justify="right")
    for (count, routing), row in rows.items():
        table.add_row(
            str(count),
            routing,
            f"{row.num_turns:,}",
            f"{row.hit:.1f}",
            f"{row.ttft_s['p50']:.3f}",
            f"{row.ttft_s['p99']:.2f}",
            f"{row.imbalance:.2f}",
            f"{row.cpu_s:.0f}",
        )
    Console().print(table)


def _plot(
    rows: Mapping[tuple[int, Routing], Served], num_replicas: Sequence[int]
) -> Figure:
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for routing in ROUTINGS:
        hits = [rows[count, routing].hit for count in num_replicas]
        axes.plot(num_replicas, hits, "o-", label=routing)
    axes.set_xscale("log")
    axes.set_ylim(0, 100)
    axes.set_xlabel("replicas")
    axes.set_ylabel("returning turns that hit, %")
    axes.legend()
    return figure
