"""Claim: placement costs microseconds a turn with 100,000 conversations in the store.

Four measurements: the time spent inside placement and the simulator's store, per turn,
while 100,000 conversations lie there and most turns force one out; one configuration of
the paper's policy table; a longer trace, from whose speed that of 5 M turns follows;
and the bytes that an idle conversation takes.

    cachedattn run configs/placement_speed.gin         1 CPU core, about 3 minutes

Expected: at most 50 microseconds a turn, 20 s for 52K turns, 30 minutes for 5 M turns,
1 KB for a conversation. Times of a turn are medians over batches of turns, less what
the stopwatch takes, which is measured in the same run; those of whole simulations are
seconds of one core.
"""

import statistics
import time
import tracemalloc
from collections.abc import Callable
from typing import cast

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cachedattn_jax.run_directory import Claim, RunDirectory
from cachedattn_jax.simulator.simulated_store import SimulatedStore
from cachedattn_jax.simulator.simulation import Simulation
from cachedattn_jax.simulator.system import System
from cachedattn_jax.simulator.trace import Trace
from cachedattn_jax.store.placement.placement import Placement
from experiments.outcome import play
from experiments.paper_setting import PaperSetting
from experiments.queue_setting import QueueSetting
from experiments.report import write_report
from experiments.sampled_lengths import message_lengths

_BATCH = 500
_TURNS_TO_REACH = 5_000_000


class Stopwatch:
    """Seconds spent inside some objects, as seen by those who call them.

    The clock is `time.perf_counter`, which takes a tenth of what a clock of the core's
    own time takes; the machine should have nothing else to do. What it measures of a
    call that does nothing is taken off for every call.

    Attributes:
        empty_s: that time, a median measured when the stopwatch is made.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._num_calls = 0
        self.empty_s = self._calibrated()

    @property
    def seconds(self) -> float:
        return self._seconds - self._num_calls * self.empty_s

    def watched(self, target: object) -> object:
        """Stands for an object; times all calls of its public methods through it."""
        proxy = _Proxy(target)
        for name in dir(type(target)):
            method = getattr(target, name)
            if not name.startswith("_") and callable(method):
                setattr(proxy, name, self._timed(method))
        return proxy

    def _timed(self, method: Callable) -> Callable:
        clock = time.perf_counter

        def timed(*args, **kwargs):
            began = clock()
            result = method(*args, **kwargs)
            self._seconds += clock() - began
            self._num_calls += 1
            return result

        return timed

    def _calibrated(self) -> float:
        empty = self._timed(lambda now: None)
        found = []
        for _ in range(100):
            self._seconds = 0.0
            for _ in range(_BATCH):
                empty(0.0)
            found.append(self._seconds / _BATCH)
        self._seconds, self._num_calls = 0.0, 0
        return statistics.median(found)


class _Proxy:
    """Has what another object has, but for what was set on it."""

    def __init__(self, target: object) -> None:
        self._target = target

    def __getattr__(self, name: str):
        return getattr(self._target, name)


def run(
    run_directory: RunDirectory,
    *,
    policies: tuple[str, ...] = ("predictive", "lookahead", "lru"),
    num_live: int = 100_000,
    num_long: int = 300_000,
    seed: int = 0,
) -> dict[str, object]:
    """Measures all four.

    Args:
        policies: the first is held against the targets.
        num_live: conversations in the store.
        num_long: turns of the longer trace, about.
    """
    setting = PaperSetting(seed=seed)
    batches: dict[str, list[float]] = {}
    with Progress(console=Console()) as progress:
        task = progress.add_task("speed", total=len(policies) + 3)
        for policy in policies:
            batches[policy] = bookkeeping_us(policy, num_live, seed)
            progress.advance(task)
        paper_s = {
            policy: play(setting, "llama-13b", policy).cpu_s for policy in policies[:2]
        }
        progress.advance(task)
        us_per_turn, num_turns = _long_us_per_turn(policies[0], num_long, seed)
        progress.advance(task)
        num_bytes = bytes_per_idle(policies[0])
        progress.advance(task)
    summary = {
        "bookkeeping_us": {
            policy: {
                "median": statistics.median(found),
                "p95_of_batches": float(np.percentile(found, 95)),
                "mean": statistics.fmean(found),
            }
            for policy, found in batches.items()
        },
        "paper_configuration_s": paper_s,
        "long": {"us_per_turn": us_per_turn, "num_turns": num_turns},
        "bytes_per_idle": num_bytes,
        "claims": _claims(
            policies[0], num_live, batches, paper_s, us_per_turn, num_turns, num_bytes
        ),
    }
    _print(batches, paper_s, us_per_turn, num_turns, num_bytes)
    figures = {"Bookkeeping a turn": _plot(batches)}
    write_report(run_directory, "Speed of placement", summary, figures)
    return summary


def live_trace(num_live: int, seed: int) -> Trace:
    """As many conversations of three turns, all of which are alive in the second.

    All begin before the first of them goes on; the third turns come in another order.
    """
    rng = np.random.default_rng(seed)
    lengths = message_lengths()
    span_s = num_live / 5.0
    num_turns = 3 * num_live
    think_s = span_s + rng.random(num_turns) * span_s
    first_row = np.arange(0, num_turns + 1, 3)
    think_s[first_row[:-1]] = 0.0
    return Trace(
        name="all-alive",
        arrival_s=np.sort(rng.random(num_live)) * span_s,
        first_row=first_row,
        new_tokens=rng.choice(lengths.later_user, num_turns),
        output_tokens=rng.choice(lengths.assistant, num_turns),
        think_s=think_s,
    )


def bookkeeping_us(policy: str, num_live: int, seed: int) -> list[float]:
    """Microseconds a turn, by batch of turns, with so many conversations stored."""
    trace = live_trace(num_live, seed)
    setting = QueueSetting()
    tokens = 2 * (trace.new_tokens + trace.output_tokens).mean()
    # About as many as fit once every conversation has had two turns.
    capacity = num_live * float(tokens) * 131_072
    watch, batches = Stopwatch(), []
    last = [0, 0.0]

    def note(num_turns: int) -> None:
        if num_turns % _BATCH:
            return
        if num_turns > num_live:
            batches.append(1e6 * (watch.seconds - last[1]) / (num_turns - last[0]))
        last[:] = num_turns, watch.seconds

    simulation = Simulation(trace, setting.system(capacity, policy), on_turns=note)
    replica = simulation.replicas[0]
    # The store goes on asking placement itself: that is part of its own calls.
    replica.store = cast(SimulatedStore, watch.watched(replica.store))
    replica.placement = cast(Placement, watch.watched(replica.placement))
    simulation.run()
    return batches


def _long_us_per_turn(policy: str, num_turns: int, seed: int) -> tuple[float, int]:
    """Microseconds of one core a turn, all of the simulation, and over how many."""
    setting = QueueSetting(num_sessions=max(1, round(num_turns / 5.76)), seed=seed)
    trace = setting.columns()
    played = Simulation(trace, setting.system(180e9, policy)).run()
    return 1e6 * played.cpu_s / trace.num_turns, trace.num_turns


def bytes_per_idle(policy: str, num_sessions: int = 20_000) -> float:
    """Bytes of Python objects in the store and placement for an idle conversation."""
    system: System = QueueSetting().system(1e15, policy)
    tracemalloc.start()
    placement = Placement(
        system.placement, host_bytes=system.host_bytes, disk_bytes=system.disk_bytes
    )
    store = SimulatedStore(system, placement)
    before, _ = tracemalloc.get_traced_memory()
    for session in range(num_sessions):
        now = float(session)
        placement.queued(session, session + 1, now)
        pages = store.index.find(session)
        placement.started(session, session + 1, now)
        pages.num_tokens = 1000
        store.save(pages, (1 << 16) - 1, now)
        placement.ended(
            session, now, num_turns=1, num_tokens=1000, kv_bytes=1000 * 131_072
        )
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return (after - before) / num_sessions


def _claims(
    policy: str,
    num_live: int,
    batches: dict[str, list[float]],
    paper_s: dict[str, float],
    us_per_turn: float,
    num_turns: int,
    num_bytes: float,
) -> list[Claim]:
    minutes = us_per_turn * _TURNS_TO_REACH / 60e6
    rows = (
        (
            f"{policy}: bookkeeping a turn, {num_live} conversations",
            statistics.median(batches[policy]),
            50.0,
            "us",
        ),
        (f"{policy}: 52K turns of the paper's setting", paper_s[policy], 20.0, "s"),
        (f"5 M turns at the speed of {num_turns} measured", minutes, 30.0, "min"),
        (f"{policy}: memory of an idle conversation", num_bytes, 1024.0, "bytes"),
    )
    return [
        Claim(name=name, value=value, target=most, comparison="<=", unit=unit)
        for name, value, most, unit in rows
    ]


def _print(
    batches: dict[str, list[float]],
    paper_s: dict[str, float],
    us_per_turn: float,
    num_turns: int,
    num_bytes: float,
) -> None:
    table = Table(title="Bookkeeping a turn, microseconds", title_justify="left")
    for name in ("policy", "median", "p95 of batches", "mean"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for policy, found in batches.items():
        values = (
            statistics.median(found),
            np.percentile(found, 95),
            statistics.fmean(found),
        )
        table.add_row(policy, *[f"{value:.1f}" for value in values])
    console = Console()
    console.print(table)
    for policy, seconds in paper_s.items():
        console.print(f"{policy}, 52K turns of the paper's setting: {seconds:.1f} s")
    console.print(f"{num_turns} turns: {us_per_turn:.0f} us each, simulation included")
    console.print(f"an idle conversation: {num_bytes:.0f} bytes")


def _plot(batches: dict[str, list[float]]) -> Figure:
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for policy, found in batches.items():
        axes.plot(_BATCH * np.arange(len(found)), found, label=policy, linewidth=0.8)
    axes.set_ylim(0, None)
    axes.set_xlabel("turns since all conversations are stored")
    axes.set_ylabel("placement and store, us a turn")
    axes.legend()
    return figure
