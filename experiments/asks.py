"""Turns that are sent when others have ended: a clock that no machine can disturb.

Knows sessions and lengths. Does not know who serves them.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A turn that is sent when so many turns of all sessions have ended."""

    session: int
    place: int
    new_tokens: int
    output_tokens: int
    after_turns: int


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


def random_asks(
    rng: np.random.Generator,
    window: int,
    page_tokens: int,
    num_sessions: int,
    num_turns: int,
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
