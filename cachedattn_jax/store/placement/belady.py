"""What an oracle would do: the bound that other policies are held against."""

import math
from collections.abc import Iterator

from sortedcontainers import SortedDict

from cachedattn_jax.store.placement.policy import Policy
from cachedattn_jax.store.placement.standing import Standing
from cachedattn_jax.store.placement.tier import TIERS, Tier


class FarthestReturn(Policy):
    """The session that comes back last goes first; O(log n) per event.

    With `LookAhead` around it this is Belady's rule: a turn still to come will stand
    behind all that wait now. It is an upper bound where sessions have equal sizes.
    """

    def __init__(self) -> None:
        self._order: dict[Tier, SortedDict] = {tier: SortedDict() for tier in TIERS}

    def entered(self, standing: Standing, tier: Tier) -> None:
        self._order[tier][_key(standing)] = standing

    def left(self, standing: Standing, tier: Tier) -> None:
        del self._order[tier][_key(standing)]

    def victims(
        self, tier: Tier, now: float, first_ticket: int | float = 0
    ) -> Iterator[Standing]:
        order = self._order[tier]
        for key in reversed(order):
            yield order[key]


def _key(standing: Standing) -> tuple[float, int]:
    at = standing.returns_at
    # Of those that never come back the oldest goes first.
    return math.inf if at is None else at, -standing.born
