"""The same turns played by an engine and by a simulated replica of it.

Knows how to keep both to one order of events, and what each of them made of the turns.
Does not know what is compared.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from cachedattn_jax.engine.engine import Engine
from cachedattn_jax.engine.engine_config import EngineConfig
from cachedattn_jax.engine.turn import TokensFrom
from cachedattn_jax.engine.turn import Turn as ServedTurn
from cachedattn_jax.model.config import LlamaConfig
from cachedattn_jax.model.llama import LlamaParams
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
from experiments.asks import Ask, Schedule
from experiments.bench import noise

SOURCES = ("device", "host", "disk", "recomputed", "new")


@dataclass(frozen=True, kw_only=True)
class Played:
    """What one of the two made of the turns: by turn, in the order of `asks`."""

    moves: list[Move]
    tokens: list[tuple[int, ...]]
    ttft_s: list[float]


def build(
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


def serve(
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


def simulate(system: System, asks: Sequence[Ask]) -> Played:
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
