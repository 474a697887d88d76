"""Makes room: pages leave a tier, downwards where a lower tier takes them.

Knows budgets. Does not know turns, which pages go first, or how pages are found.
"""

import time
from collections import Counter
from collections.abc import Sequence
from itertools import islice

import jax

from cachedattn_jax.store.device_pool import DevicePool
from cachedattn_jax.store.disk_tier import PASSING, DiskTier
from cachedattn_jax.store.exits import Exits
from cachedattn_jax.store.host_tier import HostTier
from cachedattn_jax.store.link import Copy
from cachedattn_jax.store.page_index import PageEntry, PageIndex
from cachedattn_jax.store.placement.tier import Tier
from cachedattn_jax.store.victims import Victims
from cachedattn_jax.store.write_backlog import WriteBacklog
from cachedattn_jax.timeline import Timeline

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
        exits: Exits,
        timeline: Timeline,
        counters: Counter[str],
        backlog_bytes: int,
    ) -> None:
        self._index = index
        self._placement = index.placement
        self._pool = pool
        self._host = host
        self._disk = disk
        self._exits = exits
        self._counters = counters
        self._victims = Victims(index)
        self._writes = WriteBacklog(index, disk, timeline, counters, backlog_bytes)

    @property
    def has_disk(self) -> bool:
        return self._disk is not None

    @property
    def under_way(self) -> list[Copy]:
        return self._writes.copies

    def slot_victims(self, num_slots: int) -> list[PageEntry] | None:
        """Pages whose leaving makes so many slots free; None if that is not enough."""
        missing = num_slots - self._pool.num_free
        units = self._victims.units(Tier.DEVICE, missing)
        victims = [entry for unit in units for entry in unit]
        return None if len(victims) < missing else victims

    def free_slots(self, victims: Sequence[PageEntry]) -> None:
        """Takes pages from their slots."""
        for entry in victims:
            self._exits.evict(entry, Tier.DEVICE, "room")
            self._placement.moved("evict", entry.session, 1)

    def make_host_room(self, num_bytes: int, *, may_wait: bool) -> bool:
        """Whether the host tier can take so many bytes now.

        Args:
            may_wait: whether to wait for the disk writes that would make room; they are
                started in any case.
        """
        if num_bytes > self._host.capacity_bytes:
            return False
        while not self._host.has_room(num_bytes):
            units = self._victims.units(Tier.HOST, self._missing_pages(num_bytes))
            if not units:
                return False
            self._demote(units, num_bytes)
            if not self._host.has_room(num_bytes):
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
        if not self._writes.takes(entry) or not self._make_disk_room(1, entry.session):
            return False
        while self._writes.is_full:
            self._writes.settle_oldest()
        self._writes.start(entry, groups, row)
        return True

    def settle_writes(self) -> None:
        """Takes note of finished writes."""
        self._writes.settle_ended()
        if self._disk is not None:
            self._disk.poll()

    def keep_reserve(self) -> None:
        """Demotes pages in the background until host memory has its reserve free.

        Only pages that the disk takes leave: nothing is lost for the reserve. Those of
        the next turns stay.
        """
        if self._disk is None:
            return
        free_bytes = self._host.capacity_bytes - self._host.used_bytes
        least = self._placement.wanted_free_bytes(free_bytes)
        if self._host.has_room(least):
            return
        missing = self._missing_pages(least)
        units = self._victims.units(Tier.HOST, missing, spares_next=True)
        self._demote(units, least, "reserve", may_lose=False)

    def drop(self, session: str, reason: str) -> None:
        """Gives up all that no turn holds of a session, writes under way included."""
        for tier in Tier:
            for entry in list(self._index.last_pages_first(session, tier)):
                if not entry.holds:
                    self._counters[f"pages_left_{tier}"] += 1
                    self._counters[f"evicted_{tier}_{reason}"] += 1
                    self.retire(entry)

    def shrink(self, session: str, tier: Tier, num_bytes: int) -> None:
        """Gives up so many bytes of a session in a tier, from its end."""
        pages = self._index.last_pages_first(session, tier)
        free = [entry for entry in pages if not entry.holds]
        num_pages = -(-num_bytes // self._pool.layout.page_bytes)
        for entry in free if self._victims.are_whole else free[:num_pages]:
            self._exits.evict(entry, tier, "quota")

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
            self._exits.evict(entry, tier, "emptied")

    def retire(self, entry: PageEntry) -> None:
        """Drops a page, wherever it is, that no conversation goes on from any more."""
        self._exits.leave_disk(entry)
        self._exits.leave_host(entry)
        if entry.slot is not None and not entry.holds:
            self._pool.give_back(self._exits.leave_device(entry))
        if entry.slot is None:
            self._index.remove(entry)

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

    def _missing_pages(self, num_bytes: int) -> int:
        """How many pages stand in the way of so many free bytes of host memory."""
        missing = self._host.used_bytes + num_bytes - self._host.capacity_bytes
        return -(-missing // self._pool.layout.page_bytes)

    def _demote(
        self,
        units: list[list[PageEntry]],
        num_bytes: int,
        reason: str = "room",
        *,
        may_lose: bool = True,
    ) -> None:
        """Takes pages out of host memory until so many bytes are free.

        All are written that have to be, and leave in their order, at once where
        nothing is being written.
        """
        is_waiting = False
        for unit in units:
            is_held_up = not self._write_together(unit, may_lose=may_lose)
            is_waiting = is_waiting or is_held_up
            if is_waiting or (
                not self._victims.are_whole and self._host.has_room(num_bytes)
            ):
                continue
            for entry in unit:
                self._exits.evict(entry, Tier.HOST, reason)
            self._placement.moved("demote", unit[0].session, len(unit))

    def _write_together(self, unit: list[PageEntry], *, may_lose: bool) -> bool:
        """Begins to write pages as far as needed; whether they may leave now."""
        dirty = [entry for entry in unit if not (entry.on_disk or entry.is_writing)]
        writable = [entry for entry in dirty if self._writes.takes(entry)]
        if dirty and self._writes.is_full:
            return False
        if writable and self._make_disk_room(len(writable), unit[0].session):
            for entry in writable:
                self._writes.start(entry)
        elif dirty:
            return may_lose
        return all(e.on_disk for e in unit if e not in dirty or e in writable)

    def _make_disk_room(self, num_pages: int, session: str) -> bool:
        """Whether the disk takes pages of a session now, whose others stay there."""
        disk = self._disk
        assert disk is not None
        missing = disk.num_objects + num_pages - disk.max_objects
        if num_pages > disk.max_objects:
            return False
        # What host memory holds too is lost least.
        others = (e for e in self._index.copies() if e.session != session)
        copies = list(islice(others, max(0, missing)))
        units = self._victims.units(Tier.DISK, missing - len(copies), but=session)
        alone = [entry for unit in units for entry in unit]
        if len(copies) + len(alone) < missing:
            return False
        for entry in copies + alone:
            session, is_copy = entry.session, entry.slab is not None
            self._exits.evict(entry, Tier.DISK, "room")
            if not is_copy:
                self._placement.moved("drop", session, 1)
        return True
