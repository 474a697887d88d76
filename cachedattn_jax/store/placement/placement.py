"""Who goes, who comes: one account of all conversations for the policies to rank.

Knows sessions, bytes and the queue. Does not know pages, arrays or clocks; every time
comes from outside, so that a simulator can ask the same questions. Sections 3.3.1 and
3.3.2 of the paper.
"""

from collections.abc import Iterable, Iterator

from cachedattn_jax.store.placement.orders import Orders
from cachedattn_jax.store.placement.placement_config import PlacementConfig
from cachedattn_jax.store.placement.rests import Rests
from cachedattn_jax.store.placement.room import Room
from cachedattn_jax.store.placement.standing import Session, Standing
from cachedattn_jax.store.placement.tier import Tier
from cachedattn_jax.store.placement.waiting_turns import WaitingTurns

Move = tuple[str, Session, int]


class Placement:
    """Decides which sessions give up a tier and which are fetched ahead.

    Args:
        host_bytes, disk_bytes: capacities of these tiers.

    Attributes:
        room: what of the tiers is spoken for.
        moves: if a list, what the store did about it: ("fetch", "demote", "drop",
            "evict" from the device or "save" to host memory, session, pages).
    """

    def __init__(
        self, config: PlacementConfig, *, host_bytes: int, disk_bytes: int
    ) -> None:
        self.config = config
        self.standings: dict[Session, Standing] = {}
        self.moves: list[Move] | None = None
        self.room = Room(
            config.host_reserve,
            config.refill,
            host_bytes=host_bytes,
            disk_bytes=disk_bytes,
        )
        self._queue = WaitingTurns()
        self._rests = Rests(config.ttl_s)
        self._orders = Orders(config)
        self._num_born = 0
        self._num_entries = 0
        # A dictionary for each session, which one policy only asks for.
        self._notes_entries = config.policy == "fifo"

    # ---- what happens to conversations ----

    def known(self, session: Session, tenant: str) -> None:
        """A session of the tenant has pages here, or will have."""
        self._standing(session, tenant)

    def recalled(self, session: Session, used_at: float) -> None:
        """A known session's last turn ended then, before this process had any."""
        standing = self.standings[session]
        if standing.is_idle and not standing.num_turns:
            self._orders.mark(standing, used_at=used_at)
            self._rests.resume(standing)

    def queued(
        self, session: Session, ticket: int, now: float, tenant: str = ""
    ) -> None:
        """A turn of the session stands in the queue, at a place named by `ticket`.

        Tickets grow from turn to turn.
        """
        standing = self._standing(session, tenant)
        if standing.is_closed:
            self._orders.mark(standing, is_closed=False)
        if standing.is_idle:
            self._rests.end(standing)
            if standing.num_turns:
                for order in self._orders.policies(standing):
                    order.returned(standing, now)
        if self._queue.add(standing, ticket):
            self._announce(standing)

    def unqueued(self, session: Session, ticket: int, now: float) -> None:
        """The turn with this ticket left the queue, and will not run."""
        standing = self.standings[session]
        rest = self._queue.remove(standing, ticket)
        if standing.tickets[0] != ticket:
            standing.tickets = rest
            return
        self._orders.unqueued(standing, ticket, rest)
        if rest:
            self._announce(standing)
        elif standing.is_idle:
            self._rests.begin(standing, now)

    def started(self, session: Session, ticket: int, now: float) -> None:
        """The turn with this ticket left the queue and runs from now on."""
        standing = self.standings[session]
        rest = self._queue.remove(standing, ticket)
        self._orders.withdraw(standing)
        standing.tickets = rest
        if rest:
            self._queue.note_fetch(standing)
        standing.num_running += 1
        standing.used_at = now
        if standing.num_running == 1:
            self.room.running_host_bytes += standing.num_bytes.get(Tier.HOST, 0)

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
            self.room.running_host_bytes -= standing.num_bytes.get(Tier.HOST, 0)
        if standing.is_stored:
            self.room.stored_kv_bytes += kv_bytes - standing.kv_bytes
        standing.num_turns, standing.num_tokens = num_turns, num_tokens
        standing.kv_bytes, standing.kind = kv_bytes, None
        standing.used_at, standing.returns_at = now, returns_at
        self._orders.restore(standing)
        if standing.is_idle:
            self._rests.begin(standing, now)
            if not standing.is_closed:
                for order in self._orders.policies(standing):
                    order.rested(standing, now)

    def closed(self, session: Session) -> None:
        """The conversation is over: what is stored of it goes before all else.

        Turns of it that wait are still served, and looked ahead to.
        """
        standing = self.standings.get(session)
        if standing is not None and not standing.is_closed:
            self._orders.mark(standing, is_closed=True)
            for order in self._orders.policies(standing):
                order.closed(standing)

    def pinned(self, session: Session, is_pinned: bool, tenant: str = "") -> None:
        """The session's pages stay below the device, or may go again.

        They leave the device when no other pages can, or no turn could run.
        """
        standing = self._standing(session, tenant)
        if standing.is_pinned == is_pinned:
            return
        self._orders.mark(standing, is_pinned=is_pinned)
        if not is_pinned and standing.is_idle and standing.num_turns:
            self._rests.resume(standing)

    def forgot(self, session: Session) -> None:
        """The session is never heard of again; what is stored still counts as its."""
        standing = self.standings.get(session)
        if standing is None or standing.num_bytes or not standing.is_idle:
            return
        self._rests.end(standing)
        del self.standings[session]

    # ---- where its pages are ----

    def resized(self, session: Session, tier: Tier, num_bytes: int) -> None:
        """The session has so many bytes in a tier now."""
        standing = self.standings.get(session) or self._standing(session, "")
        held = standing.num_bytes
        before = held.get(tier, 0)
        if num_bytes == before:
            return
        if num_bytes and before:
            held[tier] = num_bytes
        else:
            self._crossed(standing, tier, num_bytes)
        if tier is Tier.DEVICE:
            return
        tenants = self._orders.tenants.by_name
        if tenants and standing.tenant in tenants:
            tenants[standing.tenant].num_bytes += num_bytes - before
        if standing.num_running and tier is Tier.HOST:
            self.room.running_host_bytes += num_bytes - before

    def on_disk_only(self, session: Session, num_bytes: int) -> None:
        """So many bytes of the session are on disk and nowhere else."""
        standing = self.standings.get(session) or self._standing(session, "")
        if standing.disk_only_bytes == num_bytes:
            return
        standing.disk_only_bytes = num_bytes
        if standing.tickets:
            self._queue.note_fetch(standing)

    def moved(self, what: str, session: Session, num_pages: int) -> None:
        """The store moved pages of a session."""
        if self.moves is not None:
            self.moves.append((what, session, num_pages))

    # ---- decisions ----

    def wanted_free_bytes(self, free_bytes: int) -> int:
        """How much host memory to make free in the background; see `Room`."""
        return self.room.wanted_free_bytes(free_bytes)

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
        first: int | float = 0
        if tier is Tier.DISK:
            first = self._queue.ticket_behind(self.room.eviction_window)
        elif spares_next:
            first = self._queue.ticket_behind(self.room.prefetch_window)
        # What is fetched must not leave again for what is fetched next.
        is_sparing = spares_next and self.config.is_prefetching
        spared_until = first if is_sparing and tier is not Tier.DISK else 0
        return self._orders.victims(tier, now, first, spared_until)

    def to_fetch(self) -> Iterable[Standing]:
        """Sessions in the prefetch window that have pages on disk only, next first.

        The window is C_mem / S_kv waiting turns, section 3.3.1. Lazy, as `victims`.
        """
        if not (self.config.is_prefetching and self._queue.has_fetches):
            return ()
        end = self._queue.ticket_behind(self.room.prefetch_window)
        return self._queue.to_fetch(end)

    def expired(self, now: float) -> list[Standing]:
        """Idle sessions whose time to live is over, the longest idle first.

        Each is told once: all that is stored of them has to go.
        """
        expired = self._rests.expired(now)
        return [s for s in expired if s.num_bytes and not s.is_pinned]

    def over_quota(self, now: float) -> Iterable[tuple[Standing, Tier, int]]:
        """Where tenants that hold too much give up bytes, and at most how many.

        What is given up is reported before the next is asked for.
        """
        return self._orders.over_quota(now)

    # ---- parts ----

    def _standing(self, session: Session, tenant: str) -> Standing:
        standing = self.standings.get(session)
        if standing is None:
            self._num_born += 1
            standing = Standing(session, self._num_born, tenant)
            self.standings[session] = standing
            self._orders.tenants.meet(tenant)
        return standing

    def _announce(self, standing: Standing) -> None:
        for order in self._orders.of(standing):
            order.queued(standing)
        self._queue.note_fetch(standing)

    def _crossed(self, standing: Standing, tier: Tier, num_bytes: int) -> None:
        """The session came into a tier, or left it."""
        held, was_stored = standing.num_bytes, standing.is_stored
        if num_bytes:
            held[tier] = num_bytes
            self._num_entries += 1
            if self._notes_entries:
                standing.entered[tier] = self._num_entries
            for order in self._orders.of(standing):
                order.entered(standing, tier)
        else:
            for order in self._orders.of(standing):
                order.left(standing, tier)
            del held[tier]
            standing.entered.pop(tier, None)
        num_more = standing.is_stored - was_stored
        self.room.num_stored += num_more
        self.room.stored_kv_bytes += num_more * standing.kv_bytes
