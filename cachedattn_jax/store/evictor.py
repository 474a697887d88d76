"""Makes room: pages leave a tier, downwards where a lower tier takes them.

Knows budgets and victims. Does not know turns or how pages are found.
"""

import time
from collections import Counter
from collections.abc import Sequence
from itertools import islice

import jax

from cachedattn_jax.store.device_pool import DevicePool
from cachedattn_jax.store.disk_tier import PASSING, DiskTier
from cachedattn_jax.store.host_tier import HostTier
from cachedattn_jax.store.page_index import PageEntry, PageIndex
from cachedattn_jax.store.placement.tier import Tier
from cachedattn_jax.store.write_backlog import WriteBacklog
from cachedattn_jax.timeline import Timeline

# Above this share of the host budget, the pages next to leave are copied to disk ahead
# of time, so that making room rarely waits for a write.
_CLEAN_ABOVE = 0.75
_BATCH_PAGES = 16
# A page that could not be read is tried again after so long; its turn computes it.
_READ_AGAIN_S = 1.0


class Evictor:
    """Frees slots, host bytes and disk bytes, asking the policy who goes first.

    Args:
        backlog_bytes: of pages that are being written; what comes beyond waits.
    """

    def __init__(
        self,
        index: PageIndex,
        pool: DevicePool,
        host: HostTier,
        disk: DiskTier | None,
        timeline: Timeline,
        counters: Counter[str],
        backlog_bytes: int,
    ) -> None:
        self._index = index
        self._placement = index.placement
        self._pool = pool
        self._host = host
        self._disk = disk
        self._counters = counters
        self._writes = WriteBacklog(index, disk, timeline, counters, backlog_bytes)

    @property
    def has_disk(self) -> bool:
        return self._disk is not None

    def slot_victims(self, num_slots: int) -> list[PageEntry] | None:
        """Pages whose leaving makes so many slots free; None if that is not enough."""
        missing = num_slots - self._pool.num_free
        victims = self._choose(Tier.DEVICE, max(0, missing))
        return None if len(victims) < missing else victims

    def free_slots(self, victims: Sequence[PageEntry]) -> None:
        """Takes pages from their slots."""
        for entry in victims:
            self._pool.give_back(self.leave_device(entry))
            self._count_loss(entry, Tier.DEVICE)

    def make_host_room(self, num_bytes: int, *, may_wait: bool) -> bool:
        """Whether the host tier can take so many bytes now.

        Args:
            may_wait: whether to wait for the disk writes that would make room; they are
                started in any case.
        """
        if num_bytes > self._host.capacity_bytes:
            return False
        while not self._host.has_room(num_bytes):
            victims = self._choose(Tier.HOST, _BATCH_PAGES)
            if not victims:
                return False
            for entry in victims:
                if self._writes.is_full:
                    break
                self._demote(entry)
                if not self._is_whole and self._host.has_room(num_bytes):
                    return True
            if self._host.has_room(num_bytes):
                return True
            if self._writes.is_waiting and not may_wait:
                return False
            self._writes.settle_oldest()
        return True

    def write(
        self,
        entry: PageEntry,
        groups: Sequence[jax.Array] | None = None,
        row: int = 0,
    ) -> bool:
        """Whether the page is on disk or on its way there.

        Waits while more bytes are on their way than the backlog may have.

        Args:
            groups, row: where its bytes are, for a page that is not in host memory.
        """
        if entry.on_disk or entry.is_writing:
            return True
        if self._disk is None or entry.token_ids is None:
            return False
        if not self._disk.can_be_written or entry.write_again_s > time.monotonic():
            return False
        if not self._make_disk_room(self._disk):
            return False
        while self._writes.is_full:
            self._writes.settle_oldest()
        if entry.slab is not None:
            groups, row = entry.slab.groups, entry.row
        assert groups is not None
        self._writes.start(self._disk, entry, groups, row)
        return True

    def settle_writes(self) -> None:
        """Takes note of finished writes and starts those that will be needed soon."""
        self._writes.settle_ended()
        if self._disk is None:
            return
        self._disk.poll()
        if not self._host.capacity_bytes:
            return
        if self._host.used_bytes > _CLEAN_ABOVE * self._host.capacity_bytes:
            for entry in self._choose(Tier.HOST, _BATCH_PAGES):
                if not self._writes.is_full:
                    self.write(entry)

    def keep_reserve(self) -> None:
        """Demotes pages in the background until host memory has its reserve free.

        Only pages that are on disk already leave: nothing is lost for the reserve.
        """
        least = self._placement.reserve_bytes
        if self._disk is None or not least or self._host.has_room(least):
            return
        victims = self._choose(Tier.HOST, _BATCH_PAGES, spares_next=True)
        for entry in victims:
            if entry.on_disk:
                self._demote(entry, "reserve")
                if not self._is_whole and self._host.has_room(least):
                    return
            elif not self._writes.is_full:
                self.write(entry)

    def drop(
        self, session: str, reason: str, tiers: Sequence[Tier] = tuple(Tier)
    ) -> None:
        """Gives up all pages of a session in some tiers that no turn holds."""
        for tier in tiers:
            for entry in list(self._index.last_pages_first(session, tier)):
                if not entry.holds:
                    self._leave(entry, tier)
                    self._count_loss(entry, tier, reason)

    def drain(self) -> None:
        """Writes all that only host memory holds, as far as it fits, and waits."""
        for entry in list(self._index.in_tier(Tier.HOST)):
            self.write(entry)
        self.settle_all()

    def settle_all(self) -> None:
        """Waits for every write under way."""
        self._writes.settle_all()

    def empty(self, tier: Tier) -> None:
        """Moves every page that is not held out of a tier; waits for the writes."""
        victims = [entry for entry in self._index.in_tier(tier) if not entry.holds]
        if tier is Tier.HOST:
            self.drain()
        for entry in victims:
            self._leave(entry, tier)
            self._count_loss(entry, tier, "emptied")

    def retire(self, entry: PageEntry) -> None:
        """Drops a page, wherever it is, that no conversation goes on from any more."""
        self.leave_disk(entry)
        self.leave_host(entry)
        if entry.slot is not None and not entry.holds:
            self._pool.give_back(self.leave_device(entry))
        if entry.slot is None:
            self._index.remove(entry)

    def leave_device(self, entry: PageEntry) -> int:
        """Takes the page from its slot, which is returned and belongs to the caller."""
        slot = entry.slot
        assert slot is not None
        entry.slot = None
        self._index.unplace(entry, Tier.DEVICE)
        return slot

    def leave_disk(self, entry: PageEntry) -> None:
        """Deletes the page's object, if there is one."""
        if entry.on_disk:
            assert self._disk is not None
            entry.on_disk = False
            self._disk.delete(entry)
            self._index.unplace(entry, Tier.DISK)

    def give_up_object(self, entry: PageEntry, reason: str) -> None:
        """Takes note that a page's object could not be used.

        What is wrong with the object itself goes to quarantine; what may pass lets it
        be for a while.
        """
        if entry.arrival is not None:
            # Or the next lease would wait for the same read.
            entry.arrival = None
            self._index.note(entry)
        if not entry.on_disk:
            return
        assert self._disk is not None
        if reason in PASSING:
            entry.read_again_s = time.monotonic() + _READ_AGAIN_S
            return
        self._counters["quarantined"] += reason != "missing"
        entry.on_disk = False
        self._disk.quarantine(entry, reason)
        self._index.unplace(entry, Tier.DISK)

    def leave_host(self, entry: PageEntry) -> None:
        """Gives up the page's row in host memory, if it has one."""
        if entry.slab is not None:
            self._host.release_row(entry.slab)
            entry.slab = None
            self._index.unplace(entry, Tier.HOST)

    @property
    def _is_whole(self) -> bool:
        """Whether sessions leave a tier as a whole."""
        return self._placement.config.granularity == "sessions"

    def _choose(
        self, tier: Tier, num_pages: int, *, spares_next: bool = False
    ) -> list[PageEntry]:
        """The next pages to leave a tier, so many or, of whole sessions, more."""
        chosen: list[PageEntry] = []
        if num_pages <= 0:
            return chosen
        victims = self._placement.victims(
            tier, time.monotonic(), spares_next=spares_next
        )
        for standing in victims:
            session = str(standing.session)
            pages = self._index.last_pages_first(session, tier)
            free = (entry for entry in pages if not entry.holds)
            left = num_pages - len(chosen)
            chosen += free if self._is_whole else islice(free, left)
            if len(chosen) >= num_pages:
                break
        return chosen

    def _demote(self, entry: PageEntry, reason: str = "room") -> None:
        """Takes a page out of host memory, at once if nothing has to be written."""
        if entry.on_disk or not self.write(entry):
            self.leave_host(entry)
            self._count_loss(entry, Tier.HOST, reason)

    def _leave(self, entry: PageEntry, tier: Tier) -> None:
        match tier:
            case Tier.DEVICE:
                self._pool.give_back(self.leave_device(entry))
            case Tier.HOST:
                self.leave_host(entry)
            case Tier.DISK:
                self.leave_disk(entry)

    def _make_disk_room(self, disk: DiskTier) -> bool:
        while not disk.has_room():
            # What host memory holds too is lost least.
            copy = self._index.oldest_copy
            victims = [copy] if copy else self._choose(Tier.DISK, 1)
            if not victims:
                return False
            for entry in victims:
                self.leave_disk(entry)
                self._count_loss(entry, Tier.DISK)
        return True

    def _count_loss(self, entry: PageEntry, tier: Tier, reason: str = "room") -> None:
        self._counters[f"pages_left_{tier}"] += 1
        self._counters[f"evicted_{tier}_{reason}"] += 1
        if entry.is_lost:
            self._counters[f"pages_lost_from_{tier}"] += 1
