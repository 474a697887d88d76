"""Plays a workload on an engine and keeps what every turn said and measured.

Knows who speaks when. Does not know how the engine serves, nor what is compared.
"""

import heapq
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from cachedattn_jax.engine.engine import Engine
from cachedattn_jax.engine.request import Request
from cachedattn_jax.engine.turn import Turn
from experiments.workload import Conversation, Workload

TurnName = tuple[str, int]  # session id, place of the turn


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """A workload that was played.

    Attributes:
        turns: by session and place, every turn of the workload.
        wall_s: from the first submission to the last token, gaps without work left out.
    """

    turns: Mapping[TurnName, Turn]
    wall_s: float


class _Clock:
    """The monotonic clock with the time skipped that nobody would work in."""

    def __init__(self) -> None:
        self._start_s = time.monotonic()
        self._skipped_s = 0.0

    def now(self) -> float:
        return self.worked() + self._skipped_s

    def worked(self) -> float:
        return time.monotonic() - self._start_s

    def skip_to(self, moment_s: float) -> None:
        self._skipped_s += max(0.0, moment_s - self.now())


def replay(
    engine: Engine,
    workload: Workload,
    *,
    seed: int,
    time_factor: float = 1.0,
    transcript: Mapping[TurnName, Turn] | None = None,
    on_turn: Callable[[Turn], None] = lambda turn: None,
) -> Replayed:
    """Serves every turn of a workload, each when its user would send it.

    A turn is sent with the whole conversation so far as its prompt. What the model said
    before is taken from the transcript, if there is one, instead of from this engine,
    so that one differing token cannot make all later turns differ.

    Args:
        time_factor: arrivals and think times are multiplied by this.
        on_turn: called with each turn that has finished.
    """
    clock = _Clock()
    order = itertools.count()  # ties in time keep the order of the workload
    due = [
        (c.arrival_s * time_factor, next(order), c, 0) for c in workload.conversations
    ]
    heapq.heapify(due)
    said: dict[str, list[int]] = {}
    running: list[tuple[Conversation, int, float, Turn]] = []
    finished: dict[TurnName, Turn] = {}
    while due or running:
        if not running and due[0][0] > clock.now():
            clock.skip_to(due[0][0])
        while due and due[0][0] <= clock.now():
            due_s, _, conversation, place = heapq.heappop(due)
            turn = _submit(engine, workload, conversation, place, said, seed)
            running.append((conversation, place, due_s, turn))
        engine.step()
        for entry in [entry for entry in running if entry[3].is_finished]:
            running.remove(entry)
            conversation, place, due_s, turn = entry
            if turn.error is not None:
                raise turn.error
            name = (conversation.session_id, place)
            finished[name] = turn
            reply = transcript[name].reply if transcript is not None else turn.reply
            said[conversation.session_id] = [*turn.prompt.tolist(), *reply]
            on_turn(turn)
            if place + 1 < len(conversation.turns):
                think_s = conversation.turns[place + 1].think_s * time_factor
                since = due_s if workload.is_open_loop else clock.now()
                heapq.heappush(
                    due, (since + think_s, next(order), conversation, place + 1)
                )
    return Replayed(turns=finished, wall_s=clock.worked())


def _submit(
    engine: Engine,
    workload: Workload,
    conversation: Conversation,
    place: int,
    said: dict[str, list[int]],
    seed: int,
) -> Turn:
    new = workload.prompt(conversation, place, engine.model.vocab_size, seed)
    before = said.get(conversation.session_id, [])
    return engine.submit(
        Request(
            session_id=conversation.session_id,
            token_ids=tuple(before) + tuple(np.asarray(new).tolist()),
            max_tokens=conversation.turns[place].output_tokens,
            is_whole_prompt=True,
        )
    )
