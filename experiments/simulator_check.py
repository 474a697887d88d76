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
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cachedattn_jax.engine.engine import Engine
from cachedattn_jax.engine.engine_config import EngineConfig
from cachedattn_jax.engine.turn import TokensFrom
from cachedattn_jax.engine.turn import Turn as ServedTurn
from cachedattn_jax.model.config import LlamaConfig, preset
from cachedattn_jax.model.llama import LlamaParams, init_params
from cachedattn_jax.run_directory import Claim, RunDirectory
from cachedattn_jax.simulator.hardware import ModelShape
from cachedattn_jax.simulator.replica import Replica
from cachedattn_jax.simulator.results import Results
from cachedattn_jax.simulator.system import System
from cachedattn_jax.simulator.turn import Turn
from cachedattn_jax.store.budget import StoreConfig
from cachedattn_jax.store.link import EmulatedLink
from cachedattn_jax.store.page import object_bytes
from cachedattn_jax.store.placement.placement import Move
from cachedattn_jax.store.placement.placement_config import PlacementConfig
from experiments.bench import noise
from experiments.report import write_report

KINDS = ("save", "evict", "demote", "fetch", "drop")
SOURCES = ("device", "host", "disk", "recomputed", "new")


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A turn that is sent when so many turns of all sessions have ended."""

    session: int
    place: int
    new_tokens: int
    output_tokens: int
    after_turns: int


@dataclass(frozen=True, kw_only=True)
class Played:
    """What one of the two made of the turns: by turn, in the order of `asks`."""

    moves: list[Move]
    tokens: list[tuple[int, ...]]
    ttft_s: list[float]


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
    asks = _asks(
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
            served = _engine(config, params, engine, placement, budgets, links, folder)
            with served:
                real, system = _serve(served, asks, placement, budgets)
        simulated = _simulate(system, asks)
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


def _asks(
    rng, window: int, page_tokens: int, num_sessions: int, num_turns: int
) -> list[Ask]:
    """Turns at random, each of which ends with a full page; some sessions end early."""
    asks, places, lengths = [], [0] * num_sessions, [0] * num_sessions
    room = window // page_tokens - 4
    for number in range(num_turns):
        session = int(rng.choice(np.flatnonzero(np.asarray(lengths) < room)))
        # The last token sampled has no keys and values: one more in the first turn.
        output = int(rng.integers(2, page_tokens))
        num_pages = int(rng.integers(1, 4))
        is_first = places[session] == 0
        asks.append(
            Ask(
                session=session,
                place=places[session],
                new_tokens=num_pages * page_tokens + is_first - output,
                output_tokens=output,
                after_turns=max(0, number - int(rng.integers(1, 8))),
            )
        )
        places[session] += 1
        lengths[session] += num_pages
    return sorted(asks, key=lambda ask: ask.after_turns)


def _engine(
    config: LlamaConfig,
    params: LlamaParams,
    engine: EngineConfig,
    placement: PlacementConfig,
    budgets: tuple[int, int, int],
    links: tuple[EmulatedLink, EmulatedLink],
    folder: str,
) -> Engine:
    """An engine with budgets in pages; `num_slots` of the device include a window."""
    item_bytes = np.dtype(
        np.float32 if config.dtype == "float32" else np.int16
    ).itemsize
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    page_tokens = engine.sizes(jax.default_backend(), config.num_layers).page_tokens
    size = page_tokens * per_token * item_bytes
    device, host, disk = budgets
    window = -(-config.window // page_tokens)
    store = StoreConfig(
        device_bytes=(device + window) * size,
        host_bytes=host * size,
        # Objects have headers; a little more than that is no further object.
        disk_bytes=disk * (size + 64 * 1024),
        disk_root=folder,
        placement=placement,
        host_device_link=links[0],
        disk_host_link=links[1],
    )
    served = Engine(config, params, engine, store, weights="random")
    served.warm_up()
    served.calibrate()
    disk_tier = served.store.disk
    assert disk_tier is not None
    disk_tier.capacity_bytes = disk * object_bytes(served.store.layout)
    return served


def _serve(
    served: Engine,
    asks: Sequence[Ask],
    placement: PlacementConfig,
    budgets: tuple[int, int, int],
) -> tuple[Played, System]:
    """Plays the turns on the engine, which settles after every step."""
    store, layout = served.store, served.store.layout
    constants = served.cost_model.constants
    assert constants is not None
    system = System(
        model=ModelShape(
            name="served",
            kv_bytes=layout.page_bytes // layout.page_tokens,
            window=served.model.window,
            num_layers=layout.num_groups,
            num_parameters=1.0,
            weight_bytes=1.0,
        ),
        constants=constants,
        host_bytes=budgets[1] * layout.page_bytes,
        disk_bytes=budgets[2] * layout.page_bytes,
        device_bytes=store.pool.num_slots * layout.page_bytes,
        placement=placement,
        max_batch=1,
        page_tokens=layout.page_tokens,
        max_staged=0,
    )
    rng = np.random.default_rng(0)
    turns: dict[Ask, ServedTurn] = {}

    def send(ask: Ask) -> None:
        prompt = noise(rng, ask.new_tokens, served.model.vocab_size)
        session = served.session(str(ask.session))
        turns[ask] = session.submit(prompt, max_tokens=ask.output_tokens)

    schedule = Schedule(asks)
    store.placement.moves = []
    num_ended = 0
    while num_ended < len(asks):
        for ask in schedule.due(num_ended):
            send(ask)
        store.settle()
        served.step()
        num_ended = sum(turn.is_finished for turn in turns.values())
    store.settle()
    if errors := [turn.error for turn in turns.values() if turn.error is not None]:
        raise errors[0]
    by_name = {str(s): s for s in range(len(asks))}
    moves: list[Move] = [
        (what, by_name[str(session).rsplit("/", 1)[-1]], num)
        for what, session, num in store.placement.moves
    ]
    done = [turns[ask] for ask in asks]
    return (
        Played(
            moves=moves,
            tokens=[_counts(turn.tokens_from) for turn in done],
            ttft_s=[turn.prefill_s or 0.0 for turn in done],
        ),
        system,
    )


def _counts(tokens: TokensFrom) -> tuple[int, ...]:
    return tuple(getattr(tokens, name) for name in SOURCES)


def _simulate(system: System, asks: Sequence[Ask]) -> Played:
    """Plays the turns on a replica in virtual time."""
    results = Results(len(asks))
    schedule, num_ended = Schedule(asks), 0

    def send() -> None:
        for ask in schedule.due(num_ended):
            turn = Turn(
                session=ask.session,
                row=rows[ask],
                place=ask.place,
                new_tokens=ask.new_tokens,
                output_tokens=ask.output_tokens,
                arrived_s=replica.clock,
            )
            replica.submit(turn, replica.clock)

    def note(turn: Turn, now: float) -> None:
        nonlocal num_ended
        num_ended += 1
        send()

    replica = Replica(system, results, itertools.count(), note, keeps_moves=True)
    rows = {ask: row for row, ask in enumerate(asks)}
    send()
    while num_ended < len(asks):
        at = replica.wake(replica.clock)
        replica.store.background(replica.clock)
        if at is not None:
            replica.wake(at)
    replica.store.background(replica.clock)
    columns = [results[name].tolist() for name in SOURCES]
    return Played(
        moves=replica.placement.moves or [],
        tokens=list(zip(*columns, strict=True)),
        ttft_s=results["prefill_s"].tolist(),
    )


class Schedule:
    """Hands out each turn in its time."""

    def __init__(self, asks: Sequence[Ask]) -> None:
        self._left, self._num_sent = deque(asks), 0

    def due(self, num_ended: int) -> list[Ask]:
        """Turns to be sent now; one at least while no other is under way."""
        found: list[Ask] = []
        while self._left and (
            self._left[0].after_turns <= num_ended
            or self._num_sent + len(found) <= num_ended
        ):
            found.append(self._left.popleft())
        self._num_sent += len(found)
        return found


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
