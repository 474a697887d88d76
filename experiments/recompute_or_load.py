"""Claim: what the engine decides, to load or to recompute, is nearly the best of both.

A grid of histories, new tokens and link speeds. At each point the same turn is served
three ways: loading all of its history, recomputing all of it, and as the cost model
decides, which may also load a beginning and recompute the rest. Fig. 18 of the paper
compares the first two at 1,024 tokens, of which 500 to 900 are history: there loading
always wins, over PCIe. A slow link turns that round.

    cachedattn run configs/recompute_or_load.gin        2 CPU cores, about 4 minutes

Expected: a regret against the better of the two of at most 5 % on average and 20 % at
the worst point. A negative regret, where loading a beginning beats both, counts as 0.
"""

import dataclasses
import functools
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from cachedattn_jax.engine.engine import Engine
from cachedattn_jax.engine.engine_config import EngineConfig
from cachedattn_jax.engine.turn import Turn
from cachedattn_jax.model.config import LlamaConfig, preset
from cachedattn_jax.model.llama import LlamaParams, init_params
from cachedattn_jax.run_directory import Claim, RunDirectory
from cachedattn_jax.store.budget import StoreConfig
from cachedattn_jax.store.link import EmulatedLink
from cachedattn_jax.store.placement.tier import Tier
from experiments.bench import noise, repeat, serve, submit, to_tier
from experiments.report import write_report

WAYS = {"load": "always", "recompute": "never", "decided": "auto"}
RESIDENT = "on the device"  # the history never left


def run(
    run_directory: RunDirectory,
    *,
    model: str = "small",
    engine: EngineConfig = EngineConfig(),
    histories: tuple[int, ...] = (128, 256, 512, 1024),
    news: tuple[int, ...] = (32, 128),
    speeds: tuple[float, ...] = (0.3, 1.0, 10.0),
    repeats: int = 3,
    seed: int = 0,
) -> dict[str, object]:
    """Serves every point of the grid three ways.

    Args:
        speeds: of the emulated link: times that at which loading 512 tokens takes as
            long as computing them.
    """
    config = preset(model)
    params = init_params(config, seed)
    rng = np.random.default_rng(seed)
    store = StoreConfig(device_bytes="320 MiB", host_bytes="512 MiB")
    engines = ways(config, params, engine, store)
    try:
        balanced = _balanced_bytes_per_s(engines["recompute"], rng)
        rows = []
        for speed in speeds:
            link = EmulatedLink(bytes_per_s=speed * balanced)
            engines["decided"].store.links.emulate(link, None)
            engines["decided"].calibrate()
            for history in histories:
                for new in news:
                    row = point(engines, rng, history, new, repeats, link=link)
                    rows.append({"link": speed, **row})
        constants = engines["decided"].cost_model.constants
        assert constants is not None
    finally:
        for served in engines.values():
            served.store.links.emulate(None, None)
            served.close()
    regrets = [row["regret"] for row in rows]
    summary = {
        "model": model,
        "balanced_bytes_per_s": balanced,
        "constants": constants.describe(),
        "rows": rows,
        "claims": [
            Claim(name="points of the grid", value=len(rows), target=24),
            Claim(
                name="mean regret against the better of load and recompute",
                value=float(np.mean(regrets)),
                target=0.05,
                comparison="<=",
                kind="emulated",
            ),
            Claim(
                name="worst regret",
                value=max(regrets),
                target=0.20,
                comparison="<=",
                kind="emulated",
            ),
        ],
    }
    _print(rows)
    figures = {"Time to first token": _plot(rows, speeds)}
    write_report(run_directory, "Load or recompute, emulated link", summary, figures)
    return summary


def ways(
    config: LlamaConfig, params: LlamaParams, engine: EngineConfig, store: StoreConfig
) -> dict[str, Engine]:
    """An engine for each way, ready to serve."""
    engines = {}
    for way, loading in WAYS.items():
        settings = dataclasses.replace(engine, loading=loading)
        engines[way] = Engine(config, params, settings, store, weights="random")
        engines[way].warm_up()
    return engines


def _balanced_bytes_per_s(served: Engine, rng: np.random.Generator) -> float:
    """Bytes of a prompt's pages over the time to compute it."""
    num_tokens, layout = 512, served.store.layout
    times = []
    for _ in range(4):
        prompt = noise(rng, num_tokens, served.model.vocab_size)
        turn = submit(served, "probe", prompt)
        serve(served)
        times.append(turn.prefill_s or 0.0)
    num_bytes = layout.num_pages(num_tokens) * layout.page_bytes
    return num_bytes / min(times)


def point(
    engines: Mapping[str, Engine],
    rng: np.random.Generator,
    history: int,
    new: int,
    repeats: int,
    *,
    link: EmulatedLink | None = None,
    names: Sequence[str] = tuple(WAYS),
) -> dict:
    """Medians of every way at one point, and what was decided.

    Args:
        engines: of `ways`.
        link: None for the machine's own.
        names: of the ways; `RESIDENT` is one, too.
    """
    vocab = engines["load"].model.vocab_size
    said = noise(rng, history, vocab)
    decisions: Counter[str] = Counter()
    computed: Counter[str] = Counter()
    reasons: list[str] = []
    for served in engines.values():
        served.store.links.emulate(None, None)
        # What the point before left would stand in the way of a long history.
        served.forget("default", "ours")
        submit(served, "ours", said)
        serve(served)

    def trial(way: str) -> float:
        served = engines["load" if way == RESIDENT else way]
        served.store.links.emulate(None, None)
        if way != RESIDENT:
            to_tier(served, Tier.HOST)
        served.store.links.emulate(link, None)
        turn: Turn = submit(served, "ours", [*said, *noise(rng, new, vocab)])
        serve(served)
        if way == "decided":
            decisions[turn.decision] += 1
            reasons.append(turn.decision_reason)
        computed[way] = turn.tokens_from.recomputed
        return turn.ttft_s or 0.0

    trials = {way: functools.partial(trial, way) for way in names}
    times = repeat(trials, repeats, f"history {history}, new {new}")
    median = {way: statistics.median(values) for way, values in times.items()}
    better = min(median["load"], median["recompute"])
    return {
        "history": history,
        "new": new,
        "seconds": median,
        "recomputed_tokens": dict(computed),
        "decision": decisions.most_common(1)[0][0],
        "reason": reasons[-1],
        "regret": max(0.0, median["decided"] / better - 1),
    }


def _print(rows: Sequence[dict]) -> None:
    table = Table(
        title="Time to first token in ms, emulated link (medians)",
        title_justify="left",
    )
    for name in ("link", "history", "new", *WAYS, "decision", "regret"):
        table.add_column(name, justify="left" if name == "decision" else "right")
    for row in rows:
        table.add_row(
            f"{row['link']:g}x",
            str(row["history"]),
            str(row["new"]),
            *[f"{1e3 * row['seconds'][way]:.1f}" for way in WAYS],
            row["decision"],
            f"{100 * row['regret']:.1f} %",
        )
    Console().print(table)


def _plot(rows: Sequence[dict], speeds: Sequence[float]) -> Figure:
    """Fig. 18 of the paper, a panel for each link: bars of the three ways."""
    figure, panels = plt.subplots(
        1, len(speeds), figsize=(3.4 * len(speeds), 3.4), layout="constrained"
    )
    for axes, speed in zip(np.atleast_1d(panels), speeds, strict=True):
        of_speed = [row for row in rows if row["link"] == speed]
        places = np.arange(len(of_speed))
        for index, way in enumerate(WAYS):
            heights = [1e3 * row["seconds"][way] for row in of_speed]
            axes.bar(places + 0.27 * (index - 1), heights, width=0.25, label=way)
        names = [f"{row['history']} / {row['new']}" for row in of_speed]
        axes.set_xticks(places, names, rotation=60, ha="right")
        axes.set_title(f"link {speed:g}x", fontsize=10)
        axes.set_xlabel("history / new, tokens")
    np.atleast_1d(panels)[0].set_ylabel("time to first token, ms")
    np.atleast_1d(panels)[0].legend()
    return figure
