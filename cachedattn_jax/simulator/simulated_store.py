"""The tiers in virtual time: what turns find stored, and what is kept of them.

Does what `store.tiered_store`, `leases`, `saver` and `fetcher` do with pages that hold
bytes, and asks the same placement. Does not know turns or how long they take.
"""

from collections import Counter

from cachedattn_jax.simulator.pages import Pages, first_pages, last_pages
from cachedattn_jax.simulator.simulated_evictor import SimulatedEvictor
from cachedattn_jax.simulator.simulated_index import SimulatedIndex
from cachedattn_jax.simulator.system import System
from cachedattn_jax.simulator.virtual_link import VirtualLinks
from cachedattn_jax.store.placement.placement import Placement
from cachedattn_jax.store.placement.tier import Tier


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
        self.index = SimulatedIndex(system, placement)
        self.links = VirtualLinks(system.constants)
        self.counters: Counter[str] = Counter()
        placement.moves = [] if keeps_moves else None
        self._evictor = SimulatedEvictor(
            system, placement, self.index, self.links, self.counters
        )
        self._num_slots = system.num_slots

    # ---- turns ----

    def reusable(self, pages: Pages) -> int:
        """The stored beginning of a conversation, as a mask."""
        return (1 << min(first_pages(pages.stored), self._num_cached(pages))) - 1

    def free_slots(self, num_slots: int, now: float) -> bool:
        """Whether so many slots are free now; evicts nothing if that is not enough."""
        index = self.index
        missing = index.num_device + num_slots - self._num_slots
        if missing <= 0:
            return True
        victims = []
        for standing in self.placement.victims(Tier.DEVICE, now):
            pages = index.sessions[standing.session]
            if pages.holds:
                continue
            num = self._evictor.num_leaving(pages.device, int(missing))
            victims.append((pages, num))
            missing -= num
            if missing <= 0:
                break
        if missing > 0:
            return False
        for pages, num in victims:
            leaving = last_pages(pages.device, num)
            unsaved = leaving & ~(pages.host | pages.disk)
            if unsaved:
                self.save(pages, unsaved, now)
            index.leave_device(pages, leaving)
            index.note("evict", pages, num)
        return True

    def take(self, pages: Pages, mask: int) -> None:
        """Pages of a turn are on the device from now on."""
        if self.system.keeps_on_device:
            self.index.enter_device(pages, mask)

    def reserve_slots(self, num_slots: int) -> None:
        """Slots for pages that a turn has still to write."""
        self.index.num_device += num_slots

    def release_slots(self, num_slots: int) -> None:
        self.index.num_device -= num_slots

    def save(self, pages: Pages, mask: int, now: float) -> None:
        """Copies pages that lie nowhere else from the device to host memory."""
        mask &= ~(pages.host | pages.disk)
        num = mask.bit_count()
        if not num:
            return
        max_host = self._evictor.max_host
        if not max_host:
            return self._write_through(pages, mask, now)
        self._evictor.make_host_room(min(num, max_host), now)
        mask = self._fitting(mask, max_host - self.index.num_host)
        if mask:
            num = mask.bit_count()
            self.index.enter_host(pages, mask)
            self.links.to_host.carry(self.index.num_bytes(pages, num), now)
            self.index.note("save", pages, num)

    def _write_through(self, pages: Pages, mask: int, now: float) -> None:
        """Without host memory pages pass it on their way to disk."""
        mask = self._fitting(mask, self._evictor.max_disk)
        if mask and self._evictor.write(pages, mask, now):
            num_bytes = self.index.num_bytes(pages, mask.bit_count())
            self.links.to_host.carry(num_bytes, now)
        else:
            self._fitting(mask, 0)

    def _fitting(self, mask: int, room: int) -> int:
        """As many pages as fit, from the first: the others are of no use without."""
        num_over = mask.bit_count() - room
        if num_over <= 0:
            return mask
        self.counters["pages_bypassed"] += num_over
        return mask ^ last_pages(mask, num_over)

    def replace(self, pages: Pages, mask: int) -> None:
        """The turn wrote over pages: what lower tiers hold of them is of no use."""
        self.index.leave_host(pages, pages.host & mask)
        self.index.leave_disk(pages, pages.disk & mask)

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
        self.index.leave_device(pages, pages.device & mask)
        self.replace(pages, mask)

    def truncate(self, pages: Pages, num_pages: int) -> None:
        """Keeps the first pages only."""
        self.drop(pages, ~((1 << num_pages) - 1))

    # ---- in the background ----

    def background(self, now: float) -> None:
        """What placement wants done now."""
        placement, evictor = self.placement, self._evictor
        for standing in placement.expired(now):
            pages = self.index.sessions[standing.session]
            self.counters["pages_expired"] += pages.stored.bit_count()
            self.drop(pages)
        for standing, tier, at_most in placement.over_quota(now):
            pages = self.index.sessions[standing.session]
            evictor.shrink(pages, tier, at_most)
        evictor.keep_reserve(now)
        # What comes takes from the reserve, which may let more come.
        while placement.config.is_prefetching and self._fetch(now):
            if not evictor.keep_reserve(now):
                break

    def _fetch(self, now: float) -> bool:
        """Whether reads of pages of the next turns have begun."""
        index, num_fetched = self.index, 0
        for standing in list(self.placement.to_fetch()):
            pages = index.sessions[standing.session]
            if pages.holds:
                continue
            missing = pages.disk & ~(pages.host | pages.device)
            num = missing.bit_count()
            if index.num_host + num > self._evictor.max_host:
                break
            num_fetched += num
            pages.arrive(now)
            num_bytes = index.num_bytes(pages, num)
            pages.arrives_at = self.links.from_disk.carry(num_bytes, now)
            pages.arriving |= missing
            self.counters["pages_fetched"] += num
            index.note("fetch", pages, num)
            index.enter_host(pages, missing)
            if not self.system.keeps_copies:
                index.leave_disk(pages, missing)
        return num_fetched > 0

    # ---- parts ----

    def _num_cached(self, pages: Pages) -> int:
        """Pages that the conversation's keys and values take."""
        return -(-max(0, pages.num_tokens - 1) // self.system.tokens_per_page)
