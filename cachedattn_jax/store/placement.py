"""Which sessions give up a tier when it fills. Pure: knows no bytes, clocks or arrays.

A policy is told what happened (`used`, `left`) and is asked for an order (`victims`).
It ranks sessions, the paper's unit; the store takes a victim's pages from its end,
because a page is of no use without the pages before it.
"""

import abc
import difflib
import enum
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass


class Tier(enum.StrEnum):
    """A memory that holds pages, fastest first."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


@dataclass(frozen=True, kw_only=True)
class QueueView:
    """What the scheduler's queue says of the near future.

    Attributes:
        waiting: sessions of the waiting requests, next one first.
    """

    waiting: tuple[str, ...] = ()


class Policy(abc.ABC):
    """An order of sessions for each tier."""

    @abc.abstractmethod
    def used(self, session: str, tier: Tier, now: float) -> None:
        """The session's pages in this tier were written or read."""

    @abc.abstractmethod
    def left(self, session: str, tier: Tier) -> None:
        """The session has no page in this tier any more."""

    @abc.abstractmethod
    def victims(self, tier: Tier, queue: QueueView, now: float) -> Iterator[str]:
        """Sessions with pages in the tier, the one to give up first at the front.

        Lazy: nothing may be reported to the policy while the iterator is in use.
        """


class LRU(Policy):
    """The session that was used longest ago goes first; O(1) per event."""

    def __init__(self) -> None:
        self._order: dict[Tier, OrderedDict[str, None]] = {
            tier: OrderedDict() for tier in Tier
        }

    def used(self, session: str, tier: Tier, now: float) -> None:
        self._order[tier][session] = None
        self._order[tier].move_to_end(session)

    def left(self, session: str, tier: Tier) -> None:
        self._order[tier].pop(session, None)

    def victims(self, tier: Tier, queue: QueueView, now: float) -> Iterator[str]:
        yield from self._order[tier]


POLICIES: dict[str, type[Policy]] = {"lru": LRU}


def policy(name: str) -> Policy:
    """A fresh policy by its name; ValueError names the nearest one known."""
    if name not in POLICIES:
        nearest = difflib.get_close_matches(name, POLICIES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"policy={name!r} is unknown; did you mean {nearest!r}?"
            f" Known: {', '.join(POLICIES)}"
        )
    return POLICIES[name]()
