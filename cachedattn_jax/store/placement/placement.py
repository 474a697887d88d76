"""Who goes, who comes: one account of all conversations for the policies to rank.

Knows sessions, bytes and the queue. Does not know pages, arrays or clocks; every time
comes from outside, so that a simulator can ask the same questions. Sections 3.3.1 and
3.3.2 of the paper.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

from sortedcontainers import SortedDict

from cachedattn_jax.store.placement.placement_config import PlacementConfig
from cachedattn_jax.store.placement.policies import policy
from cachedattn_jax.store.placement.policy import Policy
from cachedattn_jax.store.placement.recency import LRU
from cachedattn_jax.store.placement.standing import Session, Standing
from cachedattn_jax.store.placement.tier import Tier

Move = tuple[str, Session, int]


@dataclass(eq=False, kw_only=True)
class _Tenant:
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
        return chain(self.closed.victims(tier, now), self.policy.victims(tier, now))


class Placement:
    """Decides which sessions give up a tier and which are fetched ahead.

    Args:
        host_bytes, disk_bytes: capacities of these tiers.

    Attributes:
        moves: if a list, what the store did about it: ("fetch", "demote", "drop",
            "evict" from the device or "save" to host memory, session, pages).
    """

    def __init__(
        self, config: PlacementConfig, *, host_bytes: int, disk_bytes: int
    ) -> None:
        self.config = config
        self.standings: dict[Session, Standing] = {}
        self.moves: list[Move] | None = None
        self.reserve_bytes = int(config.host_reserve * host_bytes)
        self._is_refilling = False
        self._host_bytes = host_bytes
        self._disk_bytes = disk_bytes
        self._policy = policy(config.policy, config.token_weight)
        # Closed sessions go before all others, pinned ones after them.
        self._closed, self._pinned = LRU(), LRU()
        self._tenants: dict[str, _Tenant] = {}
        # Idle sessions, with the time since when they are, if that is ever asked for.
        self._has_ttl = config.ttl_s is not None
        self._resting: OrderedDict[Standing, float] = OrderedDict()
        # Waiting turns by ticket: all, and the first of sessions with pages to fetch.
        self._queue: SortedDict = SortedDict()
        self._to_fetch: SortedDict = SortedDict()
        self._num_born = 0
        self._num_entries = 0
        # A dictionary for each session, which one policy only asks for.
        self._notes_entries = config.policy == "fifo"
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
                for policy in self._policies(standing):
                    policy.returned(standing, now)
        self._queue[ticket] = standing
        standing.tickets = (*standing.tickets, ticket)
        if standing.tickets[0] == ticket:
            self._announce(standing)

    def unqueued(self, session: Session, ticket: int, now: float) -> None:
        """The turn with this ticket left the queue, to run or not."""
        standing = self.standings[session]
        del self._queue[ticket]
        rest = tuple(other for other in standing.tickets if other != ticket)
        if standing.tickets[0] != ticket:
            standing.tickets = rest
            return
        self._to_fetch.pop(ticket, None)
        if standing.is_closed and not rest:  # from now on it is the first to go
            self._withdraw(standing)
            standing.tickets = ()
            self._restore(standing)
        else:
            standing.tickets = ()
            for order in self._orders(standing):
                order.unqueued(standing, ticket)
            standing.tickets = rest
        if rest:
            self._announce(standing)
        elif standing.is_idle:
            if self._has_ttl:
                self._resting[standing] = now

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
            if self._has_ttl:
                self._resting[standing] = now
            if not standing.is_closed:
                for policy in self._policies(standing):
                    policy.rested(standing, now)

    def closed(self, session: Session) -> None:
        """The conversation is over: what is stored of it goes before all else.

        Turns of it that wait are still served, and looked ahead to.
        """
        standing = self.standings.get(session)
        if standing is not None and not standing.is_closed:
            self._mark(standing, is_closed=True)
            for policy in self._policies(standing):
                policy.closed(standing)

    def pinned(self, session: Session, is_pinned: bool, tenant: str = "") -> None:
        """The session's pages stay below the device, or may go again.

        They leave the device when no other pages can, or no turn could run.
        """
        standing = self._standing(session, tenant)
        if standing.is_pinned == is_pinned:
            return
        self._mark(standing, is_pinned=is_pinned)
        is_waiting = standing.is_idle and standing.num_turns
        if self._has_ttl and not is_pinned and is_waiting:
            # Its time was over while it could not go.
            self._resting.setdefault(standing, standing.used_at)
            self._resting.move_to_end(standing, last=False)

    def forgot(self, session: Session) -> None:
        """The session is never heard of again; what is stored still counts as its."""
        standing = self.standings.get(session)
        if standing is None or standing.num_bytes or not standing.is_idle:
            return
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
            held[tier] = num_bytes
            if self._notes_entries:
                standing.entered[tier] = self._num_entries
            self._enter(standing, tier)
        else:
            self._leave(standing, tier)
            del held[tier]
            standing.entered.pop(tier, None)
        if tier is not Tier.DEVICE:
            self._account(standing, tier, num_bytes - before, was_stored)

    def on_disk_only(self, session: Session, num_bytes: int) -> None:
        """So many bytes of the session are on disk and nowhere else."""
        standing = self._standing(session, "")
        standing.disk_only_bytes = num_bytes
        if standing.tickets:
            self._note_fetch(standing)

    def moved(self, what: str, session: Session, num_pages: int) -> None:
        """The store moved pages of a session."""
        if self.moves is not None:
            self.moves.append((what, session, num_pages))

    # ---- decisions ----

    def wanted_free_bytes(self, free_bytes: int) -> int:
        """How much host memory the background should make free, of which so much is.

        The reserve; once it is touched a quarter more, so that pages leave in runs and
        not one by one at every step.
        """
        refilled_bytes = self.reserve_bytes + self.reserve_bytes // 4
        if free_bytes < self.reserve_bytes:
            self._is_refilling = True
        elif free_bytes >= refilled_bytes:
            self._is_refilling = False
        return refilled_bytes if self._is_refilling else self.reserve_bytes

    def victims(
        self, tier: Tier, now: float, *, spares_next: bool = False
    ) -> Iterator[Standing]:
        """Sessions with pages in a tier, the one to give up first at the front.

        Closed ones go first, then those of tenants over their quota, then as the
        policy says. Running ones are not among them, and pinned ones only on the
        device, as the last. Lazy: nothing may be reported while it is in use.

        Args:
            spares_next: whether sessions in the prefetch window are exempt, whatever
                the policy. On disk those in the eviction window always are, for
                policies that look ahead.
        """
        yield from self._closed.victims(tier, now)
        first: int | float = 0
        if tier is Tier.DISK:
            room = self._prefetchable_bytes + self._disk_bytes
            first = self._ticket_behind(room)
        elif spares_next:
            first = self._ticket_behind(self._prefetchable_bytes)
        # What is fetched must not leave again for what is fetched next.
        is_sparing = spares_next and self.config.is_prefetching
        is_sparing = is_sparing and tier is not Tier.DISK
        given: set[Standing] = set()
        for tenant in self._over_quota():
            for standing in tenant.policy.victims(tier, now):
                if not (is_sparing and _is_before(standing, first)):
                    given.add(standing)
                    yield standing
        for standing in self._policy.victims(tier, now, first):
            if not (standing in given or (is_sparing and _is_before(standing, first))):
                yield standing
        if tier is Tier.DEVICE:
            yield from self._pinned.victims(tier, now)

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
            standing, since = next(iter(self._resting.items()))
            if since + ttl_s > now:
                break
            del self._resting[standing]
            if standing.num_bytes and not standing.is_pinned:
                found.append(standing)
        return found

    def over_quota(self, now: float) -> Iterator[tuple[Standing, Tier, int]]:
        """Where tenants that hold too much give up bytes, and at most how many.

        What is given up is reported before the next is asked for.
        """
        for tenant in list(self._over_quota()):
            for tier in (Tier.DISK, Tier.HOST):
                for standing in list(tenant.victims(tier, now)):
                    if tenant.excess <= 0:
                        break
                    yield standing, tier, tenant.excess

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
            quota = self.config.quota(tenant)
            if quota is not None and tenant not in self._tenants:
                order = policy(self.config.policy, self.config.token_weight)
                self._tenants[tenant] = _Tenant(quota=quota, policy=order)
        return standing

    def _policies(self, standing: Standing) -> tuple[Policy, ...]:
        """Those that learn from what a session does."""
        own = self._tenants.get(standing.tenant) if self._tenants else None
        return (self._policy,) if own is None else (self._policy, own.policy)

    def _orders(self, standing: Standing) -> tuple[Policy, ...]:
        """Those that a session stands in as it is now."""
        if standing.num_running:
            return ()
        if standing.is_pinned:
            return (self._pinned,)
        if standing.is_closed and not standing.tickets:
            own = self._tenants.get(standing.tenant)
            return (self._closed,) if own is None else (self._closed, own.closed)
        return self._policies(standing)

    def _announce(self, standing: Standing) -> None:
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
        for order in self._orders(standing):
            order.entered(standing, tier)

    def _leave(self, standing: Standing, tier: Tier) -> None:
        for order in self._orders(standing):
            order.left(standing, tier)

    def _account(
        self, standing: Standing, tier: Tier, num_more: int, was_stored: bool
    ) -> None:
        is_stored = _is_stored(standing)
        if is_stored != was_stored:
            self._num_stored += 1 if is_stored else -1
            self._stored_kv_bytes += standing.kv_bytes * (1 if is_stored else -1)
        if self._tenants and standing.tenant in self._tenants:
            self._tenants[standing.tenant].num_bytes += num_more
        if tier is Tier.HOST and standing.num_running:
            self._running_host_bytes += num_more

    def _over_quota(self) -> Iterator[_Tenant]:
        return (tenant for tenant in self._tenants.values() if tenant.excess > 0)


def _is_before(standing: Standing, ticket: int | float) -> bool:
    return bool(standing.tickets) and standing.tickets[0] < ticket


def _is_stored(standing: Standing) -> bool:
    """Whether any of it lies below the device."""
    return Tier.HOST in standing.num_bytes or Tier.DISK in standing.num_bytes
