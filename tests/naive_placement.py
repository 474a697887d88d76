"""What placement must answer, from sorted lists and sums made anew for every question.

Shares nothing with the code under test but the names of tiers and events.
"""

import math
from dataclasses import dataclass, field

from cachedattn_jax.store.placement.tier import Tier


@dataclass(eq=False)
class Known:
    """A session, with what its place in any order could depend on."""

    name: str
    born: int
    tenant: str
    tickets: list[int] = field(default_factory=list)
    running: int = 0
    closed: bool = False
    pinned: bool = False
    turns: int = 0
    kv: int = 0
    disk_only: int = 0
    used: float = 0.0
    idle_since: float | None = None
    returns: float | None = None
    held: dict[Tier, int] = field(default_factory=dict)
    entered: dict[Tier, int] = field(default_factory=dict)
    stamp: dict[Tier, int] = field(default_factory=dict)  # when it came to its rank

    def rank(self, looks_ahead: bool) -> str:
        if self.running:
            return "running"
        if self.pinned:
            return "pinned"
        if self.tickets:
            return "queued" if looks_ahead else "live"
        return "closed" if self.closed else "idle" if looks_ahead else "live"


class NaivePlacement:
    """The same questions as `Placement` answers, by policy name."""

    def __init__(
        self, policy, *, host, disk, reserve, ttl=None, quotas=None, prefetches=True
    ) -> None:
        self.policy = policy
        self.looks_ahead = policy in ("lookahead", "belady")
        self.host, self.disk, self.reserve = host, disk, int(reserve * host)
        self.ttl, self.quotas, self.prefetches = ttl, quotas or {}, prefetches
        self.known: dict[str, Known] = {}
        self.queue: dict[int, Known] = {}
        self.events = 0
        self.num_born = 0

    def see(self, name: str, tenant: str = "") -> Known:
        if name not in self.known:
            self.num_born += 1
            self.known[name] = Known(name, self.num_born, tenant)
        return self.known[name]

    def change(self, name: str, tenant: str, what) -> None:
        """Something happens to a session; it comes to a new rank where that changes."""
        one = self.see(name, tenant)
        self.events += 1
        before = one.rank(self.looks_ahead)
        what(one)
        if one.rank(self.looks_ahead) != before:
            for tier in one.held:
                one.stamp[tier] = self.events

    def resize(self, name: str, tier: Tier, num: int) -> None:
        one = self.see(name)
        self.events += 1
        if num and tier not in one.held:
            one.stamp[tier] = one.entered[tier] = self.events
        one.held[tier] = num
        if not num:
            del one.held[tier]

    def window(self, room: int) -> list[int]:
        stored = [
            o for o in self.known.values() if {Tier.HOST, Tier.DISK} & set(o.held)
        ]
        mean = sum(o.kv for o in stored) / max(1, len(stored))
        return sorted(self.queue)[: int(room / max(1.0, mean))]

    @property
    def fetchable(self) -> int:
        running = sum(
            o.held.get(Tier.HOST, 0) for o in self.known.values() if o.running
        )
        return max(0, self.host - self.reserve - running)

    def excess(self, tenant: str) -> int:
        return -self.quotas[tenant] + sum(
            o.held.get(Tier.HOST, 0) + o.held.get(Tier.DISK, 0)
            for o in self.known.values()
            if o.tenant == tenant
        )

    def order(
        self, tier: Tier, exempt: set[int], tenant: str | None = None
    ) -> list[str]:
        own = [
            o
            for o in self.known.values()
            if tier in o.held and (tenant is None or o.tenant == tenant)
        ]

        def by(rank: str, key) -> list[Known]:
            found = [o for o in own if o.rank(self.looks_ahead) == rank]
            return sorted(found, key=key)

        def stamp(o):
            return o.stamp[tier]

        key = {
            "lru": stamp,
            "lookahead": stamp,
            "fifo": lambda o: o.entered[tier],
            "fifo_by_age": lambda o: o.born,
            "belady": lambda o: (
                -math.inf if o.returns is None else -o.returns,
                o.born,
            ),
        }[self.policy]
        policy = by("idle", key) + by("live", key)
        queued = by("queued", lambda o: -o.tickets[0])
        if not self.looks_ahead and tier is Tier.DISK:
            exempt = set()
        policy = [o for o in policy + queued if not exempt & set(o.tickets[:1])]
        if tenant is not None:
            return [o.name for o in by("closed", stamp) + policy]
        tenants = {
            o.tenant: None for o in self.known.values() if o.tenant in self.quotas
        }
        over = [t for t in tenants if self.excess(t) > 0]
        first = [
            o
            for t in over
            for o in by("idle", key) + by("live", key) + queued
            if o.tenant == t and (tier is Tier.DISK or not exempt & set(o.tickets[:1]))
        ]
        whole = by("closed", stamp) + first + [o for o in policy if o not in first]
        if tier is Tier.DEVICE:
            whole += by("pinned", stamp)
        return [o.name for o in whole]

    def victims(self, tier: Tier, spares_next: bool = False) -> list[str]:
        exempt: set[int] = set()
        if tier is Tier.DISK:
            exempt = set(self.window(self.fetchable + self.disk))
        elif spares_next:
            exempt = set(self.window(self.fetchable))
        return self.order(tier, exempt)

    def to_fetch(self) -> list[str]:
        if not self.prefetches:
            return []
        found = [
            self.queue[t]
            for t in self.window(self.fetchable)
            if self.queue[t].disk_only
        ]
        return list(dict.fromkeys(o.name for o in found if o.tickets))

    def expired(self, now: float) -> list[str]:
        gone = [
            o
            for o in self.known.values()
            if self.ttl is not None
            and o.idle_since is not None
            and o.idle_since + self.ttl <= now
            and o.held
            and not o.pinned
        ]
        return sorted(o.name for o in gone)
