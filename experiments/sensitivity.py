"""Claim: which of the things that the paper leaves open decide its tables.

Each row changes one parameter of `PaperSetting` and plays look-ahead and LRU at 10 TB,
LLaMA-13B. The base is the setting of all tables of the paper.

    cachedattn run configs/paper/sensitivity.gin       2 CPU cores, about 5 minutes

Expected: what a session takes in the store decides most. With sessions that take a
whole window the paper's numbers come out; with pages, which take what they hold, more
of them fit, and the margin of look-ahead over LRU shrinks.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from cachedattn_jax.run_directory import Claim, RunDirectory
from experiments.jobs import run_jobs
from experiments.outcome import Outcome, play
from experiments.paper_setting import REPORTED_POLICIES, TB, PaperSetting
from experiments.report import write_report

_POLICIES = ("lookahead", "lru")
# Parameter and value by row.
CHANGES: dict[str, dict] = {
    "base": {},
    "sessions take what they hold": {"allocation": "held"},
    "first turns do not count": {"counts_first": False},
    "users think for 1 minute": {"think_s": 60.0},
    "users think for 10 minutes": {"think_s": 600.0},
    "replies as in the sample": {"reply_scale": 1.0},
    "no overhead of a prefill": {"prefill_overhead_s": 0.0},
    "speeds of the measured turns": {"prefill_scale": 0.88},
    "batch of 12": {"max_batch": 12},
    "batch of 48": {"max_batch": 48},
    "nothing of DRAM kept free": {"host_reserve": 0.0},
    "30 % of DRAM kept free": {"host_reserve": 0.3},
    "disk at 2 GB/s": {"disk_bytes_per_s": 2e9},
    "disk at 4 GB/s": {"disk_bytes_per_s": 4e9},
    "fetched stays on disk": {"keeps_copies": True},
    "another seed": {"seed": 1},
}


def run(
    run_directory: RunDirectory,
    *,
    setting: PaperSetting = PaperSetting(),
    disk_tb: int = 10,
    num_processes: int = 2,
) -> dict[str, object]:
    """Plays every row with both policies."""
    jobs = {
        (name, policy): partial(
            play,
            replace(setting, **change),
            "llama-13b",
            policy,
            disk_bytes=disk_tb * TB,
        )
        for name, change in CHANGES.items()
        for policy in _POLICIES
    }
    outcomes: dict[tuple[str, str], Outcome] = run_jobs(
        jobs, "sensitivity", num_processes
    )
    _print(outcomes, disk_tb)
    summary = {
        "setting": setting,
        "rows": [
            {"change": name, "policy": policy, **vars(found)}
            for (name, policy), found in outcomes.items()
        ],
        "claims": _claims(outcomes, disk_tb),
    }
    figures = {"Hits": _plot(outcomes, disk_tb)}
    write_report(run_directory, "What the paper leaves open", summary, figures)
    return summary


def _margin(outcomes: Mapping[tuple[str, str], Outcome], name: str) -> float:
    return outcomes[name, "lookahead"].hit - outcomes[name, "lru"].hit


def _claims(outcomes: Mapping[tuple[str, str], Outcome], disk_tb: int) -> list[Claim]:
    held = "sessions take what they hold"
    found = [
        Claim(
            name=f"margin of look-ahead that pages leave, {disk_tb} TB",
            value=100 * _margin(outcomes, held) / max(1e-9, _margin(outcomes, "base")),
            target=50.0,
            comparison="<=",
            unit="%",
            kind="simulated",
        )
    ]
    paper = REPORTED_POLICIES["lookahead"].get(disk_tb)
    if paper:
        found.append(
            Claim(
                name="base: distance of look-ahead from the paper's hit rate",
                value=abs(outcomes["base", "lookahead"].hit - paper[0]),
                target=2.0,
                comparison="<=",
                unit="points",
                kind="simulated",
            )
        )
    return found


def _print(outcomes: Mapping[tuple[str, str], Outcome], disk_tb: int) -> None:
    table = Table(title=f"LLaMA-13B, {disk_tb} TB", title_justify="left")
    table.add_column("changed")
    for name in ("look-ahead %", "LRU %", "margin", "in DRAM %", "TTFT s", "GPU hours"):
        table.add_column(name, justify="right")
    for name in CHANGES:
        ahead, lru = (outcomes[name, policy] for policy in _POLICIES)
        table.add_row(
            name,
            f"{ahead.hit:.1f}",
            f"{lru.hit:.1f}",
            f"{_margin(outcomes, name):.1f}",
            f"{ahead.hit_host:.1f}",
            f"{ahead.ttft_s:.3f}",
            f"{ahead.gpu_h:.2f}",
        )
    reported = [REPORTED_POLICIES[policy].get(disk_tb) for policy in _POLICIES]
    if all(reported):
        hits = [row[0] for row in reported if row]
        row = (*[f"{hit:.1f}" for hit in hits], f"{hits[0] - hits[1]:.1f}")
        table.add_row("the paper", *row)
    Console().print(table)


def _plot(outcomes: Mapping[tuple[str, str], Outcome], disk_tb: int) -> Figure:
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    places = range(len(CHANGES))
    for policy, offset in (("lookahead", -0.2), ("lru", 0.2)):
        hits = [outcomes[name, policy].hit for name in CHANGES]
        axes.barh([p + offset for p in places], hits, 0.38, label=policy)
        reported = REPORTED_POLICIES[policy].get(disk_tb)
        if reported:
            axes.axvline(reported[0], color="k", linestyle=":", linewidth=0.8)
    axes.set_yticks(list(places), list(CHANGES))
    axes.invert_yaxis()
    axes.set_xlabel("turns that hit, %; dotted: the paper's")
    axes.legend()
    return figure
