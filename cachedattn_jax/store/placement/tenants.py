"""Quotas: what each tenant may hold, and what it gives up first. Knows no queue."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

from cachedattn_jax.store.placement.placement_config import PlacementConfig
from cachedattn_jax.store.placement.policies import policy
from cachedattn_jax.store.placement.policy import Policy
from cachedattn_jax.store.placement.recency import LRU
from cachedattn_jax.store.placement.standing import Standing
from cachedattn_jax.store.placement.tier import Tier


@dataclass(eq=False, kw_only=True)
class Tenant:
    """A tenant with a quota.

    Attributes:
        num_bytes: below the device.
        policy, closed: the order among its own sessions.
    """

    quota: int
    policy: Policy
    closed: LRU = field(default_factory=LRU)
    num_bytes: int = 0

    @property
    def excess(self) -> int:
        return self.num_bytes - self.quota

    def victims(self, tier: Tier, now: float) -> Iterator[Standing]:
        """All its sessions, closed ones first."""
        return chain(self.closed.victims(tier, now), self.policy.victims(tier, now))


class Tenants:
    """Tenants with a quota.

    Attributes:
        by_name: from their first session on; empty where nobody has a quota.
    """

    def __init__(self, config: PlacementConfig) -> None:
        self._config = config
        self.by_name: dict[str, Tenant] = {}

    def meet(self, name: str) -> None:
        """A session of a tenant was seen for the first time."""
        quota = self._config.quota(name)
        if quota is not None and name not in self.by_name:
            order = policy(self._config.policy, self._config.token_weight)
            self.by_name[name] = Tenant(quota=quota, policy=order)

    def over_quota(self) -> Iterator[Tenant]:
        """Those that hold too much now."""
        return (tenant for tenant in self.by_name.values() if tenant.excess > 0)
