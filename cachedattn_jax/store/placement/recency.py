"""Policies that look back: least recently used, and first in first out."""

from collections import OrderedDict
from collections.abc import Iterator

from sortedcontainers import SortedDict

from cachedattn_jax.store.placement.policy import Policy
from cachedattn_jax.store.placement.standing import Standing
from cachedattn_jax.store.placement.tier import TIERS, Tier


class LRU(Policy):
    """The session that was used longest ago goes first; O(1) per event.

    A session that comes into a tier counts as used there.
    """

    def __init__(self) -> None:
        self._order: dict[Tier, OrderedDict[Standing, None]] = {
            tier: OrderedDict() for tier in TIERS
        }

    def entered(self, standing: Standing, tier: Tier) -> None:
        self._order[tier][standing] = None

    def left(self, standing: Standing, tier: Tier) -> None:
        del self._order[tier][standing]

    def victims(
        self, tier: Tier, now: float, first_ticket: int | float = 0
    ) -> Iterator[Standing]:
        return iter(self._order[tier])


class FIFO(Policy):
    """The session that came into the tier first goes first, whatever its use since.

    O(log n) per event.

    Args:
        by_age: the oldest conversation goes first instead, whenever it came in.
    """

    def __init__(self, *, by_age: bool = False) -> None:
        self._by_age = by_age
        self._order: dict[Tier, SortedDict] = {tier: SortedDict() for tier in TIERS}

    def entered(self, standing: Standing, tier: Tier) -> None:
        self._order[tier][self._key(standing, tier)] = standing

    def left(self, standing: Standing, tier: Tier) -> None:
        del self._order[tier][self._key(standing, tier)]

    def victims(
        self, tier: Tier, now: float, first_ticket: int | float = 0
    ) -> Iterator[Standing]:
        return iter(self._order[tier].values())

    def _key(self, standing: Standing, tier: Tier) -> int:
        return standing.born if self._by_age else standing.entered[tier]
