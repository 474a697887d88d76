"""Pages being written to disk: so many bytes at once and no more.

Knows writes and what becomes of them. Does not know why a page is written.
"""

import time
from collections import Counter, deque
from collections.abc import Sequence

import jax

from cachedattn_jax.store.disk_tier import DiskTier
from cachedattn_jax.store.link import Copy
from cachedattn_jax.store.page_index import PageEntry, PageIndex
from cachedattn_jax.store.placement.tier import Tier
from cachedattn_jax.timeline import Timeline

# A page that could not be written is tried again after so long, while it is there.
_WRITE_AGAIN_S = 1.0


class WriteBacklog:
    """Writes under way, the oldest first.

    Args:
        backlog_bytes: of pages being written; one page always may be.
    """

    def __init__(
        self,
        index: PageIndex,
        disk: DiskTier | None,
        timeline: Timeline,
        counters: Counter[str],
        backlog_bytes: int,
    ) -> None:
        self._index = index
        self._disk = disk
        self._timeline = timeline
        self._counters = counters
        self._writes: deque[tuple[Copy, PageEntry]] = deque()
        object_bytes = disk.object_bytes if disk else 1
        self._max_writes = max(1, backlog_bytes // object_bytes)

    @property
    def is_full(self) -> bool:
        """Whether as many bytes are being written as may be."""
        self.settle_ended()
        return len(self._writes) >= self._max_writes

    @property
    def is_waiting(self) -> bool:
        """Whether settling the oldest write would have to wait."""
        return bool(self._writes) and not self._writes[0][0].has_ended

    @property
    def copies(self) -> list[Copy]:
        return [copy for copy, _ in self._writes]

    def takes(self, entry: PageEntry) -> bool:
        """Whether the page can be written now, if there is room for it."""
        disk = self._disk
        if disk is None or entry.token_ids is None or not disk.can_be_written:
            return False
        return entry.write_again_s <= time.monotonic()

    def start(
        self,
        entry: PageEntry,
        groups: Sequence[jax.Array] | None = None,
        row: int = 0,
    ) -> None:
        """Begins to write a page that it takes; there is room for it.

        Args:
            groups, row: where its bytes are, for a page that is not in host memory.
        """
        if entry.slab is not None:
            groups, row = entry.slab.groups, entry.row
        assert self._disk is not None and groups is not None
        entry.is_writing = True
        self._writes.append((self._disk.write(entry, groups, row), entry))

    def settle_ended(self) -> None:
        """Takes note of writes that have ended; never waits."""
        while self._writes and self._writes[0][0].has_ended:
            self.settle_oldest()

    def settle_all(self) -> None:
        """Waits for every write under way."""
        while self._writes:
            self.settle_oldest()

    def settle_oldest(self) -> None:
        """Waits for the oldest write, if there is one, and takes note of it."""
        if not self._writes or self._disk is None:
            return
        copy, entry = self._writes.popleft()
        copy.wait()
        entry.is_writing = False
        if copy.has_failed:
            self._disk.forget(entry)
            self._counters["write_failures"] += 1
            entry.write_again_s = time.monotonic() + _WRITE_AGAIN_S
        elif self._index.find(entry.key) is not entry:
            self._disk.delete(entry)
        else:
            self._note(copy)
            entry.on_disk = True
            self._index.place(entry, Tier.DISK)
        if entry.is_lost:
            self._index.remove(entry)

    def _note(self, copy: Copy) -> None:
        start_s, end_s = copy.span
        self._counters["pages_written"] += 1
        self._counters["bytes_host_to_disk"] += copy.num_bytes
        self._counters["us_host_to_disk"] += int(1e6 * (end_s - start_s))
        self._timeline.add(
            "write", "host to disk", start_s, end_s, bytes=copy.num_bytes
        )
