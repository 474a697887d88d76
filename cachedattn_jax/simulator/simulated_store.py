"""The tiers in virtual time: which pages of which session lie where.

Knows pages as bits of a number, one for each tier of a session. Does not know turns or
how long they take. It does what `store.evictor`, `leases` and `saver` do with pages
that hold bytes, and asks the same placement.
"""

from collections import Counter, OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from cachedattn_jax.simulator.system import System
from cachedattn_jax.simulator.virtual_link import VirtualLink
from cachedattn_jax.store.placement.placement import Placement
from cachedattn_jax.store.placement.tier import Tier


@dataclass(slots=True, eq=False)
class Pages:
    """Pages of one session.

    Attributes:
        num_tokens: tokens of the conversation, the last of which was sampled and has no
            keys and values yet.
        num_dropped: tokens that truncations took from its front.
        device, host, disk: bit i is set where page i lies in the tier.
        arriving, arrives_at: pages that are on their way from disk to host memory.
        holds: turns that need it to stay where it is.
        is_stale: whether positions baked into its keys are not those it has now.
    """

    session: int
    num_tokens: int = 0
    num_dropped: int = 0
    device: int = 0
    host: int = 0
    disk: int = 0
    arriving: int = 0
    arrives_at: float = 0.0
    holds: int = 0
    is_stale: bool = False

    @property
    def stored(self) -> int:
        return self.device | self.host | self.disk


def first_pages(mask: int) -> int:
    """How many pages lie in `mask` without a gap, from page 0 on."""
    return (~mask & (mask + 1)).bit_length() - 1


class SimulatedStore:
    """Pages of all sessions under the budgets of one replica.

    Args:
        keeps_moves: whether placement notes every move.
    """

    def __init__(
        self, system: System, placement: Placement, *, keeps_moves: bool = False
    ) -> None:
        self.system = system
        self.placement = placement
        self.sessions: dict[Hashable, Pages] = {}
        self.to_device = VirtualLink(system.constants.host_to_device)
        self.to_host = VirtualLink(system.constants.device_to_host)
        self.from_disk = VirtualLink(system.constants.disk_read)
        self.to_disk = VirtualLink(system.constants.disk_write)
        self.counters: Counter[str] = Counter()
        placement.moves = [] if keeps_moves else None
        self._page_bytes = system.page_bytes
        self._num_slots = system.num_slots
        self._max_host = system.host_bytes // self._page_bytes
        self._max_disk = system.disk_bytes // self._page_bytes
        self.num_device = self.num_host = self.num_disk = 0
        # Sessions with pages on disk that host memory holds too, the oldest first.
        self._copies: OrderedDict[Pages, None] = OrderedDict()
        self._is_whole = system.placement.granularity == "sessions"

    def pages(self, session: int) -> Pages:
        found = self.sessions.get(session)
        if found is None:
            found = self.sessions[session] = Pages(session)
        return found

    # ---- turns ----

    def reusable(self, pages: Pages) -> int:
        """The stored beginning of a conversation, as a mask."""
        return (1 << min(first_pages(pages.stored), self._num_cached(pages))) - 1

    def free_slots(self, num_slots: int, now: float) -> bool:
        """Whether so many slots are free now; evicts nothing if that is not enough."""
        missing = self.num_device + num_slots - self._num_slots
        if missing <= 0:
            return True
        victims = []
        for standing in self.placement.victims(Tier.DEVICE, now):
            pages = self.sessions[standing.session]
            if pages.holds:
                continue
            num = pages.device.bit_count()
            num = num if self._is_whole else min(num, int(missing))
            victims.append((pages, num))
            missing -= num
            if missing <= 0:
                break
        if missing > 0:
            return False
        for pages, num in victims:
            leaving = _last_pages(pages.device, num)
            unsaved = leaving & ~(pages.host | pages.disk)
            if unsaved:
                self.save(pages, unsaved, now)
            self._leave_device(pages, leaving)
            self._note("evict", pages, num)
        return True

    def take(self, pages: Pages, mask: int) -> None:
        """Pages of a turn are on the device from now on."""
        if not self.system.keeps_on_device:
            return
        self.num_device += (mask & ~pages.device).bit_count()
        pages.device |= mask
        self._resized(pages, Tier.DEVICE, pages.device)

    def reserve_slots(self, num_slots: int) -> None:
        """Slots for pages that a turn has still to write."""
        self.num_device += num_slots

    def release_slots(self, num_slots: int) -> None:
        self.num_device -= num_slots

    def save(self, pages: Pages, mask: int, now: float) -> None:
        """Copies pages that lie nowhere else from the device to host memory."""
        mask &= ~(pages.host | pages.disk)
        num = mask.bit_count()
        if not num:
            return
        if not self._max_host:
            return self._write_through(pages, mask, now)
        self._make_host_room(min(num, self._max_host), now)
        mask = self._fitting(mask, self._max_host - self.num_host)
        num = mask.bit_count()
        pages.host |= mask
        self.num_host += num
        self._resized(pages, Tier.HOST, pages.host)
        if num:
            self.to_host.carry(self.num_bytes(pages, num), now)
            self._note("save", pages, num)

    def _write_through(self, pages: Pages, mask: int, now: float) -> None:
        """Without host memory pages pass it on their way to disk."""
        num = min(mask.bit_count(), self._max_disk)
        has_room = self._make_disk_room(num, now, pages)
        mask = self._fitting(mask, num if has_room else 0)
        if mask:
            self.to_host.carry(self.num_bytes(pages, mask.bit_count()), now)
            self._write(pages, mask, now)

    def _fitting(self, mask: int, room: int) -> int:
        """As many pages as fit, from the first: the others are of no use without."""
        num_over = mask.bit_count() - room
        if num_over <= 0:
            return mask
        self.counters["pages_bypassed"] += num_over
        return mask ^ _last_pages(mask, num_over)

    def replace(self, pages: Pages, mask: int) -> None:
        """The turn wrote over pages: what lower tiers hold of them is of no use."""
        self._leave_host(pages, pages.host & mask)
        self._leave_disk(pages, pages.disk & mask)

    def catch_up(self, pages: Pages, num_tokens: int, num_dropped: int) -> None:
        """Takes note of what was said elsewhere: a tail that grew is of no use here."""
        if num_dropped != pages.num_dropped:
            self.drop(pages)
        elif num_tokens != pages.num_tokens and pages.num_tokens:
            num_full = (pages.num_tokens - 1) // self.system.tokens_per_page
            self.truncate(pages, num_full)
        pages.num_tokens, pages.num_dropped = num_tokens, num_dropped

    def shift(self, pages: Pages, num_pages: int) -> None:
        """Drops pages from the front; those behind them become the first."""
        mask = (1 << num_pages) - 1
        self.drop(pages, mask)
        pages.device >>= num_pages
        pages.host >>= num_pages
        pages.disk >>= num_pages
        pages.arriving >>= num_pages

    def drop(self, pages: Pages, mask: int = -1) -> None:
        """Pages leave every tier."""
        self._leave_device(pages, pages.device & mask)
        self.replace(pages, mask)

    def truncate(self, pages: Pages, num_pages: int) -> None:
        """Keeps the first pages only."""
        self.drop(pages, ~((1 << num_pages) - 1))

    # ---- in the background ----

    def background(self, now: float) -> None:
        """What placement wants done now."""
        placement = self.placement
        for standing in placement.expired(now):
            pages = self.sessions[standing.session]
            self.counters["pages_expired"] += pages.stored.bit_count()
            self.drop(pages)
        for standing, tier, at_most in placement.over_quota(now):
            pages = self.sessions[standing.session]
            mask = pages.disk if tier is Tier.DISK else pages.host
            num = self._num_leaving(mask, -(-at_most // self._page_bytes))
            if pages.holds:
                continue
            self.counters["pages_over_quota"] += num
            (self._leave_disk if tier is Tier.DISK else self._leave_host)(
                pages, _last_pages(mask, num)
            )
        self._keep_reserve(now)
        # What comes takes from the reserve, which may let more come.
        while placement.config.is_prefetching and self._fetch(now):
            if not self._keep_reserve(now):
                break

    def _keep_reserve(self, now: float) -> bool:
        """Whether pages left host memory so that its reserve is free."""
        if not self._max_disk:
            return False
        wanted = self.placement.wanted_free_bytes(self._free_bytes)
        shortage = self.num_host + -(-wanted // self._page_bytes) - self._max_host
        if shortage <= 0 or not wanted:
            return False
        before = self.num_host
        self._demote(shortage, now, for_reserve=True)
        # Refilled, if it is: the engine, which asks at every step, sees that too.
        self.placement.wanted_free_bytes(self._free_bytes)
        return self.num_host < before

    @property
    def _free_bytes(self) -> int:
        return self.system.host_bytes - self.num_host * self._page_bytes

    def arrive(self, pages: Pages, now: float) -> None:
        """Notes pages that have come from disk by now."""
        if pages.arriving and pages.arrives_at <= now:
            pages.arriving = 0

    def _fetch(self, now: float) -> bool:
        """Whether reads of pages of the next turns have begun."""
        num_fetched = 0
        for standing in list(self.placement.to_fetch()):
            pages = self.sessions[standing.session]
            if pages.holds:
                continue
            missing = pages.disk & ~(pages.host | pages.device)
            num = missing.bit_count()
            if self.num_host + num > self._max_host:
                break
            num_fetched += num
            self.arrive(pages, now)
            pages.arrives_at = self.from_disk.carry(self.num_bytes(pages, num), now)
            pages.arriving |= missing
            pages.host |= missing
            self.num_host += num
            self.counters["pages_fetched"] += num
            self._note("fetch", pages, num)
            if not self.system.keeps_copies:
                self._leave_disk(pages, missing)
            self._resized(pages, Tier.HOST, pages.host)
            self._note_copies(pages)
        return num_fetched > 0

    def _make_host_room(self, num: int, now: float) -> bool:
        shortage = self.num_host + num - self._max_host
        return shortage <= 0 or self._demote(shortage, now)

    def _demote(self, num: int, now: float, *, for_reserve: bool = False) -> bool:
        """Takes pages out of host memory, to disk where it has room.

        Args:
            for_reserve: nothing is lost, and the next turns keep theirs.
        """
        victims = []
        for standing in self.placement.victims(Tier.HOST, now, spares_next=for_reserve):
            pages = self.sessions[standing.session]
            if pages.holds:
                continue
            leaving = self._num_leaving(pages.host, num)
            victims.append((pages, leaving))
            num -= leaving
            if num <= 0:
                break
        for pages, leaving in victims:
            self._demote_pages(pages, leaving, now, may_lose=not for_reserve)
        return num <= 0

    def _demote_pages(
        self, pages: Pages, num: int, now: float, *, may_lose: bool
    ) -> None:
        mask = _last_pages(pages.host, num)
        dirty = mask & ~pages.disk
        if dirty and self._make_disk_room(dirty.bit_count(), now, pages):
            self.counters["pages_demoted"] += dirty.bit_count()
            self._write(pages, dirty, now)
        elif dirty and not may_lose:
            return
        lost = mask & ~(pages.disk | pages.device)
        self.counters["pages_lost_from_host"] += lost.bit_count()
        self._note("demote", pages, num)
        self._leave_host(pages, mask)

    def _write(self, pages: Pages, mask: int, now: float) -> None:
        """Copies pages to disk, which has room for them."""
        num = mask.bit_count()
        pages.disk |= mask
        self.num_disk += num
        self._resized(pages, Tier.DISK, pages.disk)
        self._note_copies(pages)
        self.to_disk.carry(self.num_bytes(pages, num), now)

    def _make_disk_room(self, num: int, now: float, writing: Pages) -> bool:
        """Whether the disk takes pages of a session now, whose others stay there."""
        shortage = self.num_disk + num - self._max_disk
        if shortage <= 0:
            return True
        if num > self._max_disk:
            return False
        chosen = []
        # What host memory holds too is lost least.
        for pages in self._copies:
            if shortage <= 0:
                break
            if pages is not writing:
                copies = pages.disk & pages.host
                leaving = _last_pages(copies, min(copies.bit_count(), shortage))
                chosen.append((pages, leaving, False))
                shortage -= leaving.bit_count()
        if shortage > 0:
            for standing in self.placement.victims(Tier.DISK, now):
                pages = self.sessions[standing.session]
                if pages.holds or pages is writing:
                    continue
                alone = pages.disk & ~pages.host
                leaving = _last_pages(alone, self._num_leaving(alone, shortage))
                chosen.append((pages, leaving, True))
                shortage -= leaving.bit_count()
                if shortage <= 0:
                    break
        if shortage > 0:
            return False
        for pages, leaving, is_drop in chosen:
            if is_drop and leaving:
                lost = leaving & ~pages.device
                self.counters["pages_lost_from_disk"] += lost.bit_count()
                self._note("drop", pages, leaving.bit_count())
            self._leave_disk(pages, leaving)
        return True

    # ---- parts ----

    def _num_cached(self, pages: Pages) -> int:
        """Pages that the conversation's keys and values take."""
        return -(-max(0, pages.num_tokens - 1) // self.system.tokens_per_page)

    def _num_leaving(self, mask: int, wanted: int) -> int:
        held = mask.bit_count()
        return held if self._is_whole else min(held, wanted)

    def num_bytes(self, pages: Pages, num: int) -> int:
        """Bytes that a copy of pages moves: what they hold, not what they take."""
        if self.system.allocation == "window":
            return num * pages.num_tokens * self.system.model.kv_bytes
        return num * self._page_bytes

    def _leave_device(self, pages: Pages, mask: int) -> None:
        if mask:
            pages.device &= ~mask
            self.num_device -= mask.bit_count()
            self._resized(pages, Tier.DEVICE, pages.device)

    def _leave_host(self, pages: Pages, mask: int) -> None:
        if mask:
            pages.host &= ~mask
            pages.arriving &= ~mask
            self.num_host -= mask.bit_count()
            self._resized(pages, Tier.HOST, pages.host)
            self._note_copies(pages)

    def _leave_disk(self, pages: Pages, mask: int) -> None:
        if mask:
            pages.disk &= ~mask
            self.num_disk -= mask.bit_count()
            self._resized(pages, Tier.DISK, pages.disk)
            self._note_copies(pages)

    def _note_copies(self, pages: Pages) -> None:
        if pages.disk & pages.host:
            self._copies.setdefault(pages, None)
        elif pages in self._copies:
            del self._copies[pages]

    def _resized(self, pages: Pages, tier: Tier, mask: int) -> None:
        placement, size = self.placement, self._page_bytes
        placement.resized(pages.session, tier, mask.bit_count() * size)
        if tier is Tier.DISK or pages.disk:
            alone = pages.disk & ~(pages.host | pages.device)
            placement.on_disk_only(pages.session, alone.bit_count() * size)

    def _note(self, what: str, pages: Pages, num: int) -> None:
        self.placement.moved(what, pages.session, num)


def _last_pages(mask: int, num: int) -> int:
    """The `num` last pages of a mask."""
    if num >= mask.bit_count():
        return mask
    found = 0
    for _ in range(num):
        bit = 1 << (mask.bit_length() - 1)
        found |= bit
        mask ^= bit
    return found
