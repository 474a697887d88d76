"""Which turn starts next. Pure: knows no arrays, no pages and no clock.

First come, first served, except that the turns of one session keep their order: while
one runs, the next waits and lets others pass.
"""

from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar, runtime_checkable


@runtime_checkable
class Waiting(Protocol):
    """What the scheduler needs to know of a turn."""

    @property
    def session(self) -> Hashable: ...


Item = TypeVar("Item", bound=Waiting)


class Scheduler(Generic[Item]):
    """A waiting queue and the set of running turns.

    Args:
        max_running: turns that may run at the same time.
    """

    def __init__(self, max_running: int) -> None:
        if max_running < 1:
            raise ValueError(f"max_running={max_running} must be at least 1")
        self.max_running = max_running
        self._waiting: dict[Item, int] = {}  # in order, with their tickets
        self._running: dict[Hashable, Item] = {}
        self._num_tickets = 0

    @property
    def running(self) -> list[Item]:
        """Running turns, in the order they started."""
        return list(self._running.values())

    @property
    def waiting(self) -> list[Item]:
        """Waiting turns, next one first."""
        return list(self._waiting)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._running

    def submit(self, item: Item) -> int:
        """Puts a turn at the end of the queue; returns its ticket, which grow."""
        self._num_tickets += 1
        self._waiting[item] = self._num_tickets
        return self._num_tickets

    def ticket(self, item: Item) -> int | None:
        """The place of a turn in the queue; None where it does not wait."""
        return self._waiting.get(item)

    @property
    def has_room(self) -> bool:
        """Whether one more turn may run."""
        return len(self._running) < self.max_running

    def startable(self, limit: int) -> list[Item]:
        """The first turns in the queue that could run, at most one of each session."""
        found: dict[Hashable, Item] = {}
        for item in self._waiting:
            if len(found) >= limit:
                break
            if item.session not in self._running:
                found.setdefault(item.session, item)
        return list(found.values())

    def next(self) -> Item | None:
        """The turn to start now, still in the queue; None if none may start."""
        startable = self.startable(1) if self.has_room else []
        return startable[0] if startable else None

    def start(self, item: Item) -> None:
        """Moves a turn from the queue to the running ones."""
        del self._waiting[item]
        self._running[item.session] = item

    def finish(self, item: Item) -> None:
        """Takes a turn out, wherever it is."""
        if self._running.get(item.session) is item:
            del self._running[item.session]
        else:
            self._waiting.pop(item, None)
