"""Claim: how much storage is enough, as published, and where the rule fails.

Fig. 23 of the paper, section 4.8: hits against the configured capacity over CCpUT, the
room that all distinct sessions of one unit of time would take with full windows; the
unit is the time to live, one hour. The paper's rule: a quarter of it is enough.

    cachedattn run configs/paper/capacity.gin          2 CPU cores, about 5 minutes

Expected: within 5 points of the figure. Only sessions that take what they hold reach
its 98 % at 0.27, and only where first turns do not count can it be 100 % at all, so
this table is played that way. The rule is a statement about how full windows are, and
about a queue that says who comes next: cases below the table change one of them each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from cachedattn_jax.run_directory import Claim, RunDirectory
from cachedattn_jax.simulator.hardware import MODELS
from cachedattn_jax.simulator.simulation import Simulation
from experiments.comparison import Comparison, print_comparisons
from experiments.jobs import run_jobs
from experiments.outcome import Outcome, play
from experiments.paper_setting import GB, REPORTED_CAPACITY, PaperSetting
from experiments.report import write_report

_HOST_BYTES = 128 * GB
_RULE, _RULE_HIT = 0.25, 98.0
# More than all sessions of any setting take.
_UNLIMITED = 10**16
_WHY = (
    "the figure does not say how it counts first turns: up to a ratio of 0.13 it is"
    " nearer to our rate with them, above only the rate without them can reach it; and"
    " DSpUT is counted here over the hour with most distinct sessions served"
)


def run(
    run_directory: RunDirectory,
    *,
    setting: PaperSetting = PaperSetting(allocation="held", counts_first=False),
    ttl_s: float = 3600.0,
    ratios: tuple[float, ...] = tuple(REPORTED_CAPACITY),
    num_processes: int = 2,
) -> dict[str, object]:
    """Plays the curve, and a quarter of CCpUT in each case.

    Args:
        ratios: of configured capacity to CCpUT.
    """
    cases = _cases(setting)
    distinct: dict[str, int] = run_jobs(
        {
            name: partial(distinct_sessions, case[0], case[1], ttl_s)
            for name, case in cases.items()
        },
        "sessions per unit of time",
        num_processes,
    )
    jobs = {
        ("base", ratio): _job(cases["base"], ratio, distinct["base"], ttl_s)
        for ratio in ratios
    } | {
        (name, _RULE): _job(case, _RULE, distinct[name], ttl_s)
        for name, case in cases.items()
    }
    outcomes: dict[tuple[str, float], Outcome] = run_jobs(
        jobs, "capacities", num_processes
    )
    comparisons = [
        Comparison(
            of=f"{ratio:g} of CCpUT",
            measure="hit, %",
            ours=outcomes["base", ratio].hit,
            published=REPORTED_CAPACITY.get(ratio),
            tolerance=3.0,
            why=_WHY,
        )
        for ratio in ratios
    ]
    print_comparisons("Fig. 23: LLaMA-13B, time to live 1 h", comparisons)
    _print_cases(outcomes, distinct, cases)
    summary = {
        "setting": setting,
        "distinct_sessions": distinct,
        "comparisons": [comparison.row() for comparison in comparisons],
        "rows": [
            {"case": name, "ratio": ratio, **vars(found)}
            for (name, ratio), found in outcomes.items()
        ],
        "claims": _claims(comparisons, outcomes),
    }
    figures = {"Hits by capacity": _plot(outcomes, ratios)}
    write_report(run_directory, "How much storage is enough", summary, figures)
    return summary


Case = tuple[PaperSetting, str, str]


def _cases(setting: PaperSetting) -> dict[str, Case]:
    """Setting, model and policy by name; each differs from the base in one thing."""
    return {
        "base": (setting, "llama-13b", "lookahead"),
        "sessions take whole windows": (
            replace(setting, allocation="window"),
            "llama-13b",
            "lookahead",
        ),
        "LRU": (setting, "llama-13b", "lru"),
        "window of 2K, LLaMA-65B": (setting, "llama-65b", "lookahead"),
        "users think for 10 minutes": (
            replace(setting, think_s=600.0),
            "llama-13b",
            "lookahead",
        ),
        "users think for 70 minutes": (
            replace(setting, think_s=4200.0),
            "llama-13b",
            "lookahead",
        ),
    }


def ccput_bytes(num_distinct: int, model: str) -> int:
    """CCpUT: full windows of so many sessions."""
    return num_distinct * MODELS[model].window * MODELS[model].kv_bytes


def distinct_sessions(setting: PaperSetting, model: str, ttl_s: float) -> int:
    """DSpUT: the most sessions served in one time to live, with room for all."""
    trace = setting.trace()
    system = setting.system(model, host_bytes=_UNLIMITED, disk_bytes=_UNLIMITED)
    turns = Simulation(trace, system).run().turns
    session = np.repeat(np.arange(trace.num_sessions), trace.turns_per_session)
    return most_distinct(session, turns["arrived_s"] + turns["queue_s"], ttl_s)


def most_distinct(session: np.ndarray, at_s: np.ndarray, span_s: float) -> int:
    """The most distinct sessions with an event in any span of time."""
    order = np.argsort(at_s, kind="stable")
    session, at_s = session[order].tolist(), at_s[order].tolist()
    inside: dict[int, int] = {}
    most = first = 0
    for number, of in enumerate(session):
        inside[of] = inside.get(of, 0) + 1
        while at_s[first] <= at_s[number] - span_s:
            old = session[first]
            inside[old] -= 1
            if not inside[old]:
                del inside[old]
            first += 1
        most = max(most, len(inside))
    return most


def _job(case: Case, ratio: float, num_distinct: int, ttl_s: float):
    setting, model, policy = case
    total = int(ratio * ccput_bytes(num_distinct, model))
    host_bytes = min(total, _HOST_BYTES)
    return partial(
        play,
        setting,
        model,
        policy,
        host_bytes=host_bytes,
        disk_bytes=total - host_bytes,
        ttl_s=ttl_s,
    )


def _claims(
    comparisons: Sequence[Comparison], outcomes: Mapping[tuple[str, float], Outcome]
) -> list[Claim]:
    distances = [abs(c.difference) for c in comparisons if c.difference is not None]
    found = [
        Claim(
            name="largest distance from Fig. 23",
            value=max(distances, default=None),
            target=5.0,
            comparison="<=",
            unit="points",
            kind="simulated",
        ),
        Claim(
            name="a quarter of CCpUT where the rule should hold",
            value=outcomes["base", _RULE].hit,
            target=_RULE_HIT - 2,
            unit="%",
            kind="simulated",
        ),
    ]
    num_failing = sum(
        outcome.hit < _RULE_HIT - 5
        for (name, ratio), outcome in outcomes.items()
        if name != "base" and ratio == _RULE
    )
    found.append(
        Claim(
            name="cases in which a quarter of CCpUT misses by more than 5 points",
            value=num_failing,
            target=1,
            kind="simulated",
        )
    )
    return found


def _print_cases(
    outcomes: Mapping[tuple[str, float], Outcome],
    distinct: Mapping[str, int],
    cases: Mapping[str, Case],
) -> None:
    title = f"{_RULE:g} of CCpUT, where the paper's rule promises {_RULE_HIT:g} %"
    table = Table(title=title, title_justify="left")
    table.add_column("case")
    for name in ("sessions an hour", "TB", "hit %", "with first turns %"):
        table.add_column(name, justify="right")
    for name, (_, model, _) in cases.items():
        found = outcomes[name, _RULE]
        terabytes = _RULE * ccput_bytes(distinct[name], model) / 1e12
        hit_all = f"{found.hit_all:.1f}"
        row = (str(distinct[name]), f"{terabytes:.2f}", f"{found.hit_later:.1f}")
        table.add_row(name, *row, hit_all)
    Console().print(table)


def _plot(
    outcomes: Mapping[tuple[str, float], Outcome], ratios: Sequence[float]
) -> Figure:
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    curve = [outcomes["base", ratio] for ratio in ratios]
    axes.plot(ratios, [found.hit_later for found in curve], "o-", label="ours")
    axes.plot(
        ratios, [found.hit_all for found in curve], "o:", label="with first turns"
    )
    axes.plot(
        list(REPORTED_CAPACITY), list(REPORTED_CAPACITY.values()), "kx--", label="paper"
    )
    for number, ((name, ratio), found) in enumerate(outcomes.items()):
        if name != "base":
            axes.plot([ratio], [found.hit_later], "s", color=f"C{number}", label=name)
    axes.set_xlabel("configured capacity / CCpUT")
    axes.set_ylabel("turns that hit, %")
    axes.legend(fontsize=8)
    return figure
