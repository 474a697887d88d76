"""The queue as placement sees it: who is needed next. Knows sessions and tickets."""

import math
from collections.abc import Iterator

from sortedcontainers import SortedDict

from cachedattn_jax.store.placement.standing import Standing


class WaitingTurns:
    """Waiting turns by ticket, and which sessions among them have pages to fetch.

    A session is looked ahead to by its first waiting turn.
    """

    def __init__(self) -> None:
        self._turns: SortedDict = SortedDict()
        self._to_fetch: SortedDict = SortedDict()

    def add(self, standing: Standing, ticket: int) -> bool:
        """Whether the turn is now the first of its session that waits."""
        self._turns[ticket] = standing
        standing.tickets = (*standing.tickets, ticket)
        return standing.tickets[0] == ticket

    def remove(self, standing: Standing, ticket: int) -> tuple[int, ...]:
        """Takes a turn out; returns the tickets that its session is left with.

        The session keeps its own, which say where policies have it.
        """
        del self._turns[ticket]
        if standing.tickets[0] == ticket:
            self._to_fetch.pop(ticket, None)
        return tuple(other for other in standing.tickets if other != ticket)

    def note_fetch(self, standing: Standing) -> None:
        """Takes note of whether a waiting session has pages on disk only."""
        ticket = standing.tickets[0]
        if standing.disk_only_bytes:
            self._to_fetch[ticket] = standing
        elif ticket in self._to_fetch:
            del self._to_fetch[ticket]

    def ticket_behind(self, num_turns: int) -> int | float:
        """The first waiting turn behind so many; infinite if no more wait."""
        turns = self._turns
        return math.inf if num_turns >= len(turns) else turns.keys()[num_turns]

    @property
    def has_fetches(self) -> bool:
        return bool(self._to_fetch)

    def to_fetch(self, end: int | float) -> Iterator[Standing]:
        """Sessions with pages to fetch before a place in the queue, next first."""
        for ticket, standing in self._to_fetch.items():
            if ticket >= end:
                return
            yield standing
