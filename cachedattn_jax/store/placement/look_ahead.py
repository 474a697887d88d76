"""The queue says who is needed, and when: look-ahead eviction, section 3.3.2."""

from collections.abc import Iterator

from sortedcontainers import SortedDict

from cachedattn_jax.store.placement.policy import Policy
from cachedattn_jax.store.placement.standing import Standing
from cachedattn_jax.store.placement.tier import TIERS, Tier


class LookAhead(Policy):
    """Idle sessions first, then waiting ones from the tail; O(log n) per event.

    Args:
        idle: the order among sessions with no waiting turn, which the paper leaves
            open.
    """

    def __init__(self, idle: Policy) -> None:
        self._idle = idle
        self._queued: dict[Tier, SortedDict] = {tier: SortedDict() for tier in TIERS}

    def entered(self, standing: Standing, tier: Tier) -> None:
        if standing.tickets:
            self._queued[tier][standing.tickets[0]] = standing
        else:
            self._idle.entered(standing, tier)

    def left(self, standing: Standing, tier: Tier) -> None:
        if standing.tickets:
            del self._queued[tier][standing.tickets[0]]
        else:
            self._idle.left(standing, tier)

    def queued(self, standing: Standing) -> None:
        for tier in standing.num_bytes:
            self._idle.left(standing, tier)
            self._queued[tier][standing.tickets[0]] = standing

    def unqueued(self, standing: Standing, ticket: int) -> None:
        for tier in standing.num_bytes:
            del self._queued[tier][ticket]
            self._idle.entered(standing, tier)

    def rested(self, standing: Standing, now: float) -> None:
        self._idle.rested(standing, now)

    def returned(self, standing: Standing, now: float) -> None:
        self._idle.returned(standing, now)

    def closed(self, standing: Standing) -> None:
        self._idle.closed(standing)

    def victims(
        self, tier: Tier, now: float, first_ticket: int | float = 0
    ) -> Iterator[Standing]:
        yield from self._idle.victims(tier, now)
        queued = self._queued[tier]
        for ticket in reversed(queued):
            if ticket < first_ticket:
                return
            yield queued[ticket]
