"""Who stands in which order: the policy's, tenants' own, the closed and the pinned.

Knows what a session's marks mean for where it stands. Knows no windows and no queue.
"""

from collections.abc import Iterable, Iterator
from itertools import chain

from cachedattn_jax.store.placement.placement_config import PlacementConfig
from cachedattn_jax.store.placement.policies import policy
from cachedattn_jax.store.placement.policy import Policy
from cachedattn_jax.store.placement.recency import LRU
from cachedattn_jax.store.placement.standing import Standing
from cachedattn_jax.store.placement.tenants import Tenants
from cachedattn_jax.store.placement.tier import Tier


class Orders:
    """All orders of sessions. Closed ones go before all others, pinned ones after them.

    A running session stands in none.
    """

    def __init__(self, config: PlacementConfig) -> None:
        self.tenants = Tenants(config)
        self._policy = policy(config.policy, config.token_weight)
        self._only_policy = (self._policy,)
        self._closed, self._pinned = LRU(), LRU()

    def policies(self, standing: Standing) -> tuple[Policy, ...]:
        """Those that learn from what a session does."""
        own = self.tenants.by_name.get(standing.tenant)
        return self._only_policy if own is None else (self._policy, own.policy)

    def of(self, standing: Standing) -> tuple[Policy, ...]:
        """Those that a session stands in as it is now."""
        if standing.num_running:
            return ()
        if standing.is_pinned:
            return (self._pinned,)
        if standing.is_closed and not standing.tickets:
            own = self.tenants.by_name.get(standing.tenant)
            return (self._closed,) if own is None else (self._closed, own.closed)
        return self.policies(standing)

    def withdraw(self, standing: Standing) -> None:
        """Takes a session out before what decides where it stands changes."""
        for order in self.of(standing):
            for tier in standing.num_bytes:
                order.left(standing, tier)

    def restore(self, standing: Standing) -> None:
        """Puts it back where it stands now."""
        for order in self.of(standing):
            for tier in standing.num_bytes:
                order.entered(standing, tier)

    def mark(self, standing: Standing, **marks: bool) -> None:
        """Sets marks of a session, and puts it where it stands then."""
        self.withdraw(standing)
        for name, value in marks.items():
            setattr(standing, name, value)
        self.restore(standing)

    def unqueued(self, standing: Standing, ticket: int, rest: tuple[int, ...]) -> None:
        """The session's first turn in the queue will not run; later ones are left."""
        if standing.is_closed and not rest:  # from now on it is the first to go
            self.withdraw(standing)
            standing.tickets = ()
            self.restore(standing)
        else:
            standing.tickets = ()
            for order in self.of(standing):
                order.unqueued(standing, ticket)
            standing.tickets = rest

    def victims(
        self,
        tier: Tier,
        now: float,
        first_ticket: int | float,
        spared_until: int | float,
    ) -> Iterator[Standing]:
        """Sessions with pages in a tier, the one to give up first at the front.

        Args:
            first_ticket: sessions with a turn before it in the queue are exempt, for
                policies that look ahead.
            spared_until: the same for all policies.
        """
        if self.tenants.by_name:
            chosen = self._by_tenant(tier, now, first_ticket, spared_until)
        else:
            chosen = self._policy.victims(tier, now, first_ticket)
            if spared_until:
                chosen = (s for s in chosen if not _is_before(s, spared_until))
        closed = self._closed.victims(tier, now)
        if tier is Tier.DEVICE:
            return chain(closed, chosen, self._pinned.victims(tier, now))
        return chain(closed, chosen)

    def over_quota(self, now: float) -> Iterable[tuple[Standing, Tier, int]]:
        """Sessions of tenants that hold too much, and by how much; see `Placement`."""
        return self._excesses(now) if self.tenants.by_name else ()

    def _by_tenant(
        self,
        tier: Tier,
        now: float,
        first_ticket: int | float,
        spared_until: int | float,
    ) -> Iterator[Standing]:
        """The policy's order, behind sessions of tenants over their quota."""
        given: set[Standing] = set()
        for tenant in self.tenants.over_quota():
            for standing in tenant.policy.victims(tier, now):
                if not _is_before(standing, spared_until):
                    given.add(standing)
                    yield standing
        for standing in self._policy.victims(tier, now, first_ticket):
            if not (standing in given or _is_before(standing, spared_until)):
                yield standing

    def _excesses(self, now: float) -> Iterator[tuple[Standing, Tier, int]]:
        for tenant in list(self.tenants.over_quota()):
            for tier in (Tier.DISK, Tier.HOST):
                for standing in list(tenant.victims(tier, now)):
                    if tenant.excess <= 0:
                        break
                    yield standing, tier, tenant.excess


def _is_before(standing: Standing, ticket: int | float) -> bool:
    return bool(standing.tickets) and standing.tickets[0] < ticket
