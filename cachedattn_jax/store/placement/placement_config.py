"""How memory is shared out among conversations. Knows no conversation."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args, no_type_check

from cachedattn_jax.store.placement.policies import check_name

Granularity = Literal["pages", "sessions"]


@no_type_check  # gin passes what users write; checked here in words of ours
@dataclass(frozen=True, kw_only=True)
class PlacementConfig:
    """Which conversations give up memory first, and which are fetched ahead.

    Attributes:
        policy: the order in which they go; see `placement.policies`.
        is_prefetching: whether pages on disk come to host memory before their turn
            runs, as far as the prefetch window of section 3.3.1 reaches.
        host_reserve: share of host memory that is kept free in the background, so that
            no fetch has to wait for room.
        refill: once the reserve is touched, so much of it is made free on top, so that
            pages leave in runs and not one by one at every step.
        granularity: what leaves a tier at once: as many pages as needed, from the end
            of a session, or the whole session, as in the paper.
        ttl_s: idle conversations are dropped after so long; None keeps them.
        quotas: bytes below the device that a tenant may hold, by tenant.
        default_quota: the same for tenants not named; None for no limit.
        token_weight: what `predictive` counts: 0 turns that find their cache, 1 tokens
            that do, and anything between. A little above 0 finds more turns than 0
            while return times are still being learnt.
    """

    policy: str = "predictive"
    is_prefetching: bool = True
    host_reserve: float = 0.05
    refill: float = 0.25
    granularity: Granularity = "pages"
    ttl_s: float | None = None
    quotas: Mapping[str, int] = field(default_factory=dict)
    default_quota: int | None = None
    token_weight: float = 0.25

    def __post_init__(self) -> None:
        check_name(self.policy)
        if self.granularity not in get_args(Granularity):
            raise ValueError(
                f"granularity={self.granularity!r} is not one of"
                f" {', '.join(get_args(Granularity))}"
            )
        for name in ("host_reserve", "refill", "token_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie from 0 to 1")
        if self.ttl_s is not None and not 0 < self.ttl_s < math.inf:
            raise ValueError(f"ttl_s={self.ttl_s} must be positive, or None for ever")
        for tenant, quota in {**self.quotas, "": self.default_quota or 0}.items():
            if not isinstance(quota, int) or quota < 0:
                raise ValueError(f"quota {quota!r} of {tenant!r} must be bytes from 0")

    def quota(self, tenant: str) -> int | None:
        """Bytes that a tenant may hold; None for no limit."""
        return self.quotas.get(tenant, self.default_quota)
