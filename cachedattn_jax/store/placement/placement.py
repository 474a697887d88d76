"""Who goes, who comes: one account of all conversations for the policies to rank.

Knows sessions, bytes and the queue. Does not know pages, arrays or clocks; every time
comes from outside, so that a simulator can ask the same questions. Sections 3.3.1 and
3.3.2 of the paper.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator

from sortedcontainers import SortedDict

from cachedattn_jax.store.placement.placement_config import PlacementConfig
from cachedattn_jax.store.placement.policies import policy
from cachedattn_jax.store.placement.policy import Policy
from cachedattn_jax.store.placement.standing import Session, Standing
from cachedattn_jax.store.placement.tier import TIERS, Tier


class Placement:
    """Decides which sessions give up a tier and which are fetched ahead.

    Args:
        host_bytes, disk_bytes: capacities of these tiers.
    """

    def __init__(
        self, config: PlacementConfig, *, host_bytes: int, disk_bytes: int
    ) -> None:
        self.config = config
        self.standings: dict[Session, Standing] = {}
        self.reserve_bytes = int(config.host_reserve * host_bytes)
        self._host_bytes = host_bytes
        self._disk_bytes = disk_bytes
        self._policy = policy(config.policy, config.token_weight)
        # Of tenants with a quota: the order among their own sessions, and their bytes.
        self._tenants: dict[str, Policy] = {}
        self._tenant_bytes: dict[str, int] = {}
        self._closed: dict[Tier, OrderedDict[Standing, None]] = {
            tier: OrderedDict() for tier in TIERS
        }
        self._resting: OrderedDict[Standing, None] = OrderedDict()
        # Waiting turns by ticket: all, and the first of sessions with pages to fetch.
        self._queue: SortedDict = SortedDict()
        self._to_fetch: SortedDict = SortedDict()
        self._num_born = 0
        self._num_entries = 0
        self._running_host_bytes = 0
        self._stored_kv_bytes = 0
        self._num_stored = 0

    # ---- what happens to conversations ----

    def known(self, session: Session, tenant: str) -> None:
        """A session of the tenant has pages here, or will have."""
        self._standing(session, tenant)

    def queued(
        self, session: Session, ticket: int, now: float, tenant: str = ""
    ) -> None:
        """A turn of the session stands in the queue, at a place named by `ticket`.

        Tickets grow from turn to turn.
        """
        standing = self._standing(session, tenant)
        if standing.is_closed:
            self._mark(standing, is_closed=False)
        if standing.is_idle:
            self._resting.pop(standing, None)
            if standing.num_turns:
                for order in self._orders(standing):
                    order.returned(standing, now)
        self._queue[ticket] = standing
        standing.tickets = (*standing.tickets, ticket)
        if standing.tickets[0] == ticket:
            self._announce(standing)

    def unqueued(self, session: Session, ticket: int) -> None:
        """The turn with this ticket left the queue, to run or not."""
        standing = self.standings[session]
        del self._queue[ticket]
        was_first = standing.tickets[0] == ticket
        rest = tuple(other for other in standing.tickets if other != ticket)
        if not was_first:
            standing.tickets = rest
            return
        self._to_fetch.pop(ticket, None)
        standing.tickets = ()
        if standing.is_ranked:
            for order in self._orders(standing):
                order.unqueued(standing, ticket)
        standing.tickets = rest
        if rest:
            self._announce(standing)
        elif standing.is_idle:
            self._resting[standing] = None

    def started(self, session: Session, now: float) -> None:
        """A turn of the session, which has left the queue, runs from now on."""
        standing = self.standings[session]
        self._resting.pop(standing, None)
        self._withdraw(standing)
        standing.num_running += 1
        standing.used_at = now
        if standing.num_running == 1:
            self._running_host_bytes += standing.num_bytes.get(Tier.HOST, 0)

    def ended(
        self,
        session: Session,
        now: float,
        *,
        num_turns: int,
        num_tokens: int,
        kv_bytes: int,
        returns_at: float | None = None,
    ) -> None:
        """A running turn of the session ended, well or not.

        Args:
            num_turns, num_tokens, kv_bytes: of the session, from now on.
            returns_at: when its next turn comes, as only an oracle knows.
        """
        standing = self.standings[session]
        standing.num_running -= 1
        if standing.num_running == 0:
            self._running_host_bytes -= standing.num_bytes.get(Tier.HOST, 0)
        if _is_stored(standing):
            self._stored_kv_bytes += kv_bytes - standing.kv_bytes
        standing.num_turns, standing.num_tokens = num_turns, num_tokens
        standing.kv_bytes = kv_bytes
        standing.used_at, standing.returns_at = now, returns_at
        self._restore(standing)
        if standing.is_idle:
            self._resting[standing] = None
            for order in self._orders(standing):
                order.rested(standing, now)

    def closed(self, session: Session) -> None:
        """The conversation is over: what is stored of it goes before all else."""
        standing = self.standings.get(session)
        if standing is not None and not standing.is_closed:
            self._mark(standing, is_closed=True)

    def pinned(self, session: Session, is_pinned: bool) -> None:
        """The session's pages stay where they are, or may go again."""
        self._mark(self._standing(session, ""), is_pinned=is_pinned)

    def forgot(self, session: Session) -> None:
        """The session, of which nothing is stored, is never heard of again."""
        standing = self.standings.get(session)
        if standing is None or not standing.is_idle:
            return
        for tier in tuple(standing.num_bytes):
            self.resized(session, tier, 0)
        self._resting.pop(standing, None)
        del self.standings[session]

    # ---- where its pages are ----

    def resized(self, session: Session, tier: Tier, num_bytes: int) -> None:
        """The session has so many bytes in a tier now."""
        standing = self._standing(session, "")
        held = standing.num_bytes
        before = held.get(tier, 0)
        if num_bytes == before:
            return
        was_stored = _is_stored(standing)
        if num_bytes and before:
            held[tier] = num_bytes
        elif num_bytes:
            self._num_entries += 1
            held[tier], standing.entered[tier] = num_bytes, self._num_entries
            self._enter(standing, tier)
        else:
            self._leave(standing, tier)
            del held[tier], standing.entered[tier]
        if tier is not Tier.DEVICE:
            self._account(standing, tier, num_bytes - before, was_stored)

    def on_disk_only(self, session: Session, num_bytes: int) -> None:
        """So many bytes of the session are on disk and nowhere else."""
        standing = self._standing(session, "")
        standing.disk_only_bytes = num_bytes
        if standing.tickets:
            self._note_fetch(standing)

    # ---- decisions ----

    def victims(
        self, tier: Tier, now: float, *, spares_next: bool = False
    ) -> Iterator[Standing]:
        """Sessions with pages in a tier, the one to give up first at the front.

        Closed ones go first, then those of tenants over their quota, then as the
        policy says. Running and pinned ones are not among them. Lazy: nothing may be
        reported while it is in use.

        Args:
            spares_next: whether sessions in the prefetch window are exempt. On disk
                those in the eviction window always are, for policies that look ahead.
        """
        yield from self._closed[tier]
        for tenant in self._over_quota():
            yield from self._tenants[tenant].victims(tier, now)
        first: int | float = 0
        if tier is Tier.DISK:
            room = self._prefetchable_bytes + self._disk_bytes
            first = self._ticket_behind(room)
        elif spares_next:
            first = self._ticket_behind(self._prefetchable_bytes)
        yield from self._policy.victims(tier, now, first)

    def to_fetch(self) -> Iterator[Standing]:
        """Sessions in the prefetch window that have pages on disk only, next first.

        The window is C_mem / S_kv waiting turns, section 3.3.1. Lazy, as `victims`.
        """
        if not self.config.is_prefetching or not self._to_fetch:
            return
        end = self._ticket_behind(self._prefetchable_bytes)
        for ticket, standing in self._to_fetch.items():
            if ticket >= end:
                return
            yield standing

    def expired(self, now: float) -> list[Standing]:
        """Idle sessions whose time to live is over, the longest idle first.

        Each is told once: all that is stored of them has to go.
        """
        found: list[Standing] = []
        ttl_s = self.config.ttl_s
        while ttl_s is not None and self._resting:
            standing = next(iter(self._resting))
            if standing.used_at + ttl_s > now:
                break
            del self._resting[standing]
            if standing.num_bytes and not standing.is_pinned:
                found.append(standing)
        return found

    def over_quota(self, now: float) -> Iterator[tuple[Standing, Tier]]:
        """Where tenants that hold too much give up bytes first.

        What is given up is reported before the next is asked for.
        """
        for tenant in list(self._over_quota()):
            for tier in (Tier.DISK, Tier.HOST):
                for standing in list(self._tenants[tenant].victims(tier, now)):
                    if self._excess(tenant) <= 0:
                        break
                    yield standing, tier

    # ---- parts ----

    @property
    def _prefetchable_bytes(self) -> int:
        """C_mem, the memory that fetches may use."""
        return max(0, self._host_bytes - self.reserve_bytes - self._running_host_bytes)

    def _ticket_behind(self, num_bytes: int) -> int | float:
        """The first waiting turn behind those whose sessions fill so many bytes."""
        mean = self._stored_kv_bytes / max(1, self._num_stored)
        window = int(num_bytes / max(1.0, mean))
        if window >= len(self._queue):
            return math.inf
        return self._queue.keys()[window]

    def _standing(self, session: Session, tenant: str) -> Standing:
        standing = self.standings.get(session)
        if standing is None:
            self._num_born += 1
            standing = Standing(session, self._num_born, tenant)
            self.standings[session] = standing
            has_quota = self.config.quota(tenant) is not None
            if has_quota and tenant not in self._tenants:
                order = policy(self.config.policy, self.config.token_weight)
                self._tenants[tenant] = order
                self._tenant_bytes[tenant] = 0
        return standing

    def _orders(self, standing: Standing) -> tuple[Policy, ...]:
        """The policies that rank a session."""
        own = self._tenants.get(standing.tenant) if self._tenants else None
        return (self._policy,) if own is None else (self._policy, own)

    def _announce(self, standing: Standing) -> None:
        if standing.is_ranked:
            for order in self._orders(standing):
                order.queued(standing)
        self._note_fetch(standing)

    def _note_fetch(self, standing: Standing) -> None:
        ticket = standing.tickets[0]
        if standing.disk_only_bytes:
            self._to_fetch[ticket] = standing
        else:
            self._to_fetch.pop(ticket, None)

    def _mark(self, standing: Standing, **marks: bool) -> None:
        self._withdraw(standing)
        for name, value in marks.items():
            setattr(standing, name, value)
        self._restore(standing)

    def _withdraw(self, standing: Standing) -> None:
        for tier in standing.num_bytes:
            self._leave(standing, tier)

    def _restore(self, standing: Standing) -> None:
        for tier in standing.num_bytes:
            self._enter(standing, tier)

    def _enter(self, standing: Standing, tier: Tier) -> None:
        if standing.is_ranked:
            for order in self._orders(standing):
                order.entered(standing, tier)
        elif standing.is_closed and not (standing.num_running or standing.is_pinned):
            self._closed[tier][standing] = None

    def _leave(self, standing: Standing, tier: Tier) -> None:
        if standing.is_ranked:
            for order in self._orders(standing):
                order.left(standing, tier)
        elif standing.is_closed:
            self._closed[tier].pop(standing, None)

    def _account(
        self, standing: Standing, tier: Tier, num_more: int, was_stored: bool
    ) -> None:
        is_stored = _is_stored(standing)
        if is_stored != was_stored:
            self._num_stored += 1 if is_stored else -1
            self._stored_kv_bytes += standing.kv_bytes * (1 if is_stored else -1)
        if standing.tenant in self._tenant_bytes:
            self._tenant_bytes[standing.tenant] += num_more
        if tier is Tier.HOST and standing.num_running:
            self._running_host_bytes += num_more

    def _excess(self, tenant: str) -> int:
        return self._tenant_bytes[tenant] - (self.config.quota(tenant) or 0)

    def _over_quota(self) -> Iterator[str]:
        return (tenant for tenant in self._tenants if self._excess(tenant) > 0)


def _is_stored(standing: Standing) -> bool:
    """Whether any of it lies below the device."""
    return Tier.HOST in standing.num_bytes or Tier.DISK in standing.num_bytes
