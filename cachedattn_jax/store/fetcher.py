"""Pages that come from disk to host memory before their turn, section 3.3.1.

Knows reads under way and room in host memory. Does not know which session is next.
"""

import time
from collections import Counter, deque
from dataclasses import dataclass

from cachedattn_jax.store.device_pool import DevicePool, split_runs
from cachedattn_jax.store.disk_read import DiskRead
from cachedattn_jax.store.disk_tier import DiskTier
from cachedattn_jax.store.evictor import Evictor
from cachedattn_jax.store.host_tier import HostTier, Slab
from cachedattn_jax.store.link import Copy
from cachedattn_jax.store.page_index import PageEntry, PageIndex
from cachedattn_jax.store.placement.tier import Tier

# Reads under way at once: enough for the worker threads, and few enough that a turn
# which must read its pages itself does not stand behind many.
_MAX_READS = 8


@dataclass(eq=False, kw_only=True)
class Arrival:
    """A run of pages on its way, and the room that waits for it."""

    entries: list[PageEntry]
    read: DiskRead
    slab: Slab


class Fetcher:
    """Reads pages into free host memory; makes no room for them."""

    def __init__(
        self,
        index: PageIndex,
        pool: DevicePool,
        host: HostTier,
        disk: DiskTier | None,
        evictor: Evictor,
        counters: Counter[str],
    ) -> None:
        self._index = index
        self._pool = pool
        self._host = host
        self._disk = disk
        self._evictor = evictor
        self._counters = counters
        self._arrivals: deque[Arrival] = deque()

    def fetch(self, session: str) -> bool:
        """Begins to read a session's pages; whether there was room for all of them."""
        disk, page_bytes = self._disk, self._pool.layout.page_bytes
        if disk is None or not disk.can_be_read:
            return False
        # Pages that a turn holds are read straight to the device.
        now = time.monotonic()
        wanted = [
            entry
            for entry in self._index.on_disk_only(session)
            if not entry.holds and entry.read_again_s <= now
        ]
        if not self._host.has_room(len(wanted) * page_bytes):
            return False
        for run in split_runs(wanted):
            if len(self._arrivals) >= _MAX_READS:
                return False
            slab = self._host.reserve(len(run), len(run) * page_bytes)
            read = disk.read(run)
            arrival = Arrival(entries=run, read=read, slab=slab)
            self._arrivals.append(arrival)
            self._counters["pages_fetched"] += len(run)
            self._index.placement.moved("fetch", session, len(run))
            for entry in run:
                entry.arrival = arrival
                self._index.note(entry)
        return True

    @property
    def under_way(self) -> list[Copy]:
        return [copy for arrival in self._arrivals for copy in arrival.read.copies]

    def poll(self) -> None:
        """Takes in what has come."""
        while self._arrivals and _has_ended(self._arrivals[0].read):
            self._take_in(self._arrivals.popleft())

    def _take_in(self, arrival: Arrival) -> None:
        read, slab, bad = arrival.read, arrival.slab, arrival.read.bad()
        for copy in read.copies:
            start_s, end_s = copy.span
            self._counters["bytes_disk_to_host"] += copy.num_bytes
            self._counters["us_disk_to_host"] += int(1e6 * (end_s - start_s))
        is_here = len(bad) < len(arrival.entries) and self._fill(slab, read)
        for row, entry in enumerate(arrival.entries):
            is_awaited = entry.arrival is arrival
            entry.arrival = None if is_awaited else entry.arrival
            if row in bad and is_awaited:
                self._counters[f"miss_{bad[row]}"] += 1
                self._evictor.give_up_object(entry, bad[row])
            is_wanted = self._index.find(entry.key) is entry and entry.slab is None
            if row in bad or not is_wanted or not is_here:
                self._host.release_row(slab)
                self._index.note(entry)
                continue
            if entry.token_ids is None:
                entry.token_ids = read.parts[0].result().headers[row].token_ids
            entry.slab, entry.row = slab, row
            self._index.place(entry, Tier.HOST)

    def _fill(self, slab: Slab, read: DiskRead) -> bool:
        """Whether what was read could be put into host memory."""
        num_groups = self._pool.layout.num_groups
        try:
            slab.groups += self._pool.put_on_host(
                [read.group(group) for group in range(num_groups)]
            )
        except Exception:  # out of memory, most likely: the pages stay on disk
            self._counters["fetch_failures"] += 1
            return False
        slab.copies += [
            read.copies[group // read.groups_per_part] for group in range(num_groups)
        ]
        return True


def _has_ended(read: DiskRead) -> bool:
    return all(copy.has_ended for copy in read.copies)
