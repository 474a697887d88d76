"""Claim: the simulator does what the engine does, move by move and token by token.

The same conversations are served by the engine, a small model over emulated links with
its disk tier in a folder, and by a simulated replica with the constants that the engine
measured of itself. Compared are the moves between tiers that placement decided, each
kind in its order; the tokens of every turn by source; and the time to first token.

Nothing may depend on which of two copies ends first, so the clock is a recorded one: a
turn is sent when so many others have ended, turns run one at a time, and the engine
settles its copies between two steps, as virtual time does. A turn is leased when it
starts (`max_staged=0`); reading a turn ahead over the device link is the matter of
`overlap_preload`. The reserve of host memory is kept but not refilled in runs, which
begin at whichever step sees it touched. Sessions leave as a whole, and turns end with a
full page: host memory of the engine is charged in runs of pages until the last of a run
has left, which the simulator does not know. `predictive` depends on the seconds
themselves and is left out.

    cachedattn run configs/simulator_check.gin        2 CPU cores, about 3 minutes

Expected: all moves and all tokens equal, and a median difference of at most 20 % in the
time to first token.
"""

import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import replace

import jax
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cachedattn_jax.engine.engine_config import EngineConfig
from cachedattn_jax.model.config import preset
from cachedattn_jax.model.llama import init_params
from cachedattn_jax.run_directory import Claim, RunDirectory
from cachedattn_jax.store.link import EmulatedLink
from cachedattn_jax.store.placement.placement import Move
from cachedattn_jax.store.placement.placement_config import PlacementConfig
from experiments.asks import random_asks
from experiments.played import SOURCES, Played, build, serve, simulate
from experiments.report import write_report

KINDS = ("save", "evict", "demote", "fetch", "drop")


def run(
    run_directory: RunDirectory,
    *,
    model: str = "small",
    window: int = 512,
    engine: EngineConfig = EngineConfig(max_batch=1, max_staged=0, loading="always"),
    policies: tuple[str, ...] = ("lookahead", "lru", "fifo", "fifo_by_age"),
    num_sessions: int = 14,
    num_turns: int = 60,
    device_pages: int = 12,
    host_pages: int = 36,
    disk_pages: int = 60,
    link_bytes_per_s: float = 400e6,
    disk_bytes_per_s: float = 200e6,
    seed: int = 0,
) -> dict[str, object]:
    """Serves the same turns with both, under every policy.

    Args:
        device_pages, host_pages, disk_pages: budgets; the device's are what is left
            when a window is running.
        link_bytes_per_s, disk_bytes_per_s: of the emulated links.
    """
    if engine.max_batch != 1 or engine.max_staged != 0:
        raise ValueError(
            f"max_batch={engine.max_batch} and max_staged={engine.max_staged} must be 1"
            " and 0, or the order of events depends on the clock"
        )
    config = replace(preset(model), window=window)
    page_tokens = engine.sizes(jax.default_backend(), config.num_layers).page_tokens
    params = init_params(config, seed)
    asks = random_asks(
        np.random.default_rng(seed), window, page_tokens, num_sessions, num_turns
    )
    budgets = device_pages, host_pages, disk_pages
    links = (
        EmulatedLink(bytes_per_s=link_bytes_per_s),
        EmulatedLink(bytes_per_s=disk_bytes_per_s),
    )
    rows, claims = [], []
    for policy in track(policies, "policies", console=Console()):
        placement = PlacementConfig(
            policy=policy,
            host_reserve=0.25,
            refill=0.0,
            granularity="sessions",
            is_prefetching=policy == "lookahead",
        )
        with tempfile.TemporaryDirectory() as folder:
            served = build(config, params, engine, placement, budgets, links, folder)
            with served:
                real, system = serve(served, asks, placement, budgets)
        simulated = simulate(system, asks)
        rows.append(_row(policy, real, simulated))
        claims += _claims(rows[-1])
    summary = {
        "model": model,
        "num_turns": len(asks),
        "rows": rows,
        "claims": claims,
    }
    _print(rows)
    write_report(
        run_directory,
        "Simulator against engine, emulated links",
        summary,
        {"Time to first token": _plot(rows)},
    )
    return summary


def merged(moves: Sequence[Move], kind: str) -> list[tuple[object, int]]:
    """Moves of a kind in order, those of one session after each other as one."""
    of_kind = [(session, num) for what, session, num in moves if what == kind]
    groups = itertools.groupby(of_kind, key=lambda move: move[0])
    return [(session, sum(num for _, num in group)) for session, group in groups]


def _row(policy: str, real: Played, simulated: Played) -> dict:
    kinds = {
        kind: (merged(real.moves, kind), merged(simulated.moves, kind))
        for kind in KINDS
    }
    ratios = np.asarray(simulated.ttft_s) / np.asarray(real.ttft_s)
    return {
        "policy": policy,
        "num_moves": {kind: len(ours) for kind, (ours, _) in kinds.items()},
        "different": [kind for kind, (ours, theirs) in kinds.items() if ours != theirs],
        "first_difference": {
            kind: next(
                (
                    [index, repr(one), repr(other)]
                    for index, (one, other) in enumerate(
                        itertools.zip_longest(ours, theirs)
                    )
                    if one != other
                ),
                None,
            )
            for kind, (ours, theirs) in kinds.items()
        },
        "turns_equal": sum(
            map(tuple.__eq__, real.tokens, map(tuple, simulated.tokens))
        ),
        "num_turns": len(real.tokens),
        "tokens": dict(
            zip(SOURCES, map(sum, zip(*real.tokens, strict=True)), strict=True)
        ),
        "ttft_off": float(np.median(np.abs(ratios - 1))),
        "ttft_s": [real.ttft_s, simulated.ttft_s],
    }


def _claims(row: dict) -> list[Claim]:
    policy = row["policy"]
    return [
        Claim(
            name=f"{policy}: kinds of moves that differ, of {len(KINDS)}",
            value=len(row["different"]),
            target=0,
            comparison="<=",
            kind="emulated",
        ),
        Claim(
            name=f"{policy}: turns whose tokens come from other sources",
            value=row["num_turns"] - row["turns_equal"],
            target=0,
            comparison="<=",
            kind="emulated",
        ),
        Claim(
            name=f"{policy}: median difference in time to first token",
            value=row["ttft_off"],
            target=0.2,
            comparison="<=",
            kind="emulated",
        ),
    ]


def _print(rows: Sequence[dict]) -> None:
    table = Table(title="Moves of both, and what differs", title_justify="left")
    for name in ("policy", *KINDS, "differ", "turns equal", "TTFT off"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["policy"],
            *[str(row["num_moves"][kind]) for kind in KINDS],
            ", ".join(row["different"]) or "none",
            f"{row['turns_equal']} of {row['num_turns']}",
            f"{100 * row['ttft_off']:.1f} %",
        )
    Console().print(table)


def _plot(rows: Sequence[dict]) -> Figure:
    figure, axes = plt.subplots(figsize=(4, 3.6), layout="constrained")
    for row in rows:
        real, simulated = (1e3 * np.asarray(values) for values in row["ttft_s"])
        axes.plot(real, simulated, ".", label=row["policy"], alpha=0.6)
    most = max(max(row["ttft_s"][0]) for row in rows) * 1e3
    axes.plot([0, most], [0, most], color="gray", lw=0.8)
    axes.set(xlabel="engine, ms to first token", ylabel="simulator, ms")
    axes.legend()
    return figure
