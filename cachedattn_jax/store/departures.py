"""Pages taken out of their slots: each run leaves for host memory when it may.

Knows runs, slabs and their room. Does not know turns, nor which pages ought to leave.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from cachedattn_jax.store.device_pool import DevicePool
from cachedattn_jax.store.evictor import Evictor
from cachedattn_jax.store.host_tier import HostTier, Slab
from cachedattn_jax.store.outbound import Outbound
from cachedattn_jax.store.page_index import PageEntry, PageIndex
from cachedattn_jax.store.placement.tier import Tier


@dataclass(eq=False, kw_only=True)
class _Run:
    """Pages taken out of their slots that have not left yet.

    Attributes:
        groups: the layer groups to be copied.
        num_bytes: of these.
        slab: the room it has in host memory, if it has; then only the last layer
            group is left to be copied.
    """

    entries: Sequence[PageEntry | None]
    groups: list[jax.Array]
    num_bytes: int
    turn: str
    slab: Slab | None = None

    @property
    def is_taken_out(self) -> bool:
        """Whether all programs before its copy have ended."""
        groups: list[Any] = self.groups  # jax's stubs do not know `is_ready`
        return all(group.is_ready() for group in groups)


class Departures:
    """Takes runs of pages out of the pool and hands over their copies.

    Args:
        outbound: takes the copies, and bounds them and the runs that wait.
    """

    def __init__(
        self,
        index: PageIndex,
        pool: DevicePool,
        host: HostTier,
        evictor: Evictor,
        outbound: Outbound,
        counters: Counter[str],
    ) -> None:
        self.outbound = outbound
        self._index = index
        self._pool = pool
        self._host = host
        self._evictor = evictor
        self._counters = counters
        self._waiting: deque[_Run] = deque()

    def take_out(
        self, entries: list[PageEntry], turn: str, *, may_wait: bool = False
    ) -> bool:
        """Takes pages out of their slots; False if there is no room for them now.

        Args:
            may_wait: whether they may wait for their room outside their slots.
        """
        num_bytes = len(entries) * self._pool.layout.page_bytes
        has_room = self._evictor.make_host_room(num_bytes, may_wait=False)
        can_ever = num_bytes <= self._host.capacity_bytes
        if not has_room and can_ever and not may_wait:
            return False
        if not has_room and not can_ever and not self._evictor.has_disk:
            self._counters["pages_not_saved"] += len(entries)
            return True
        try:
            slots = [e.slot for e in entries if e.slot is not None]
            groups = self._pool.extract(slots, to_host=self.outbound.is_direct)
        except Exception:  # out of memory, most likely: they are not saved
            self._counters["save_failures"] += 1
            return True
        run = _Run(entries=entries, groups=groups, num_bytes=num_bytes, turn=turn)
        self.outbound.num_bytes += num_bytes
        if has_room:
            self._send(run)
        elif can_ever:
            self._wait(run)
        else:
            self._pass_through(run)
        return True

    def reserve(self, num_rows: int) -> Slab | None:
        """Room in the buffer and in host memory for a run; None if there is none now.

        Its pages are copied with `Outbound.send`, and `complete` makes them known.
        """
        num_bytes = num_rows * self._pool.layout.page_bytes
        if not self.outbound.fits(num_bytes):
            return None
        if not self._evictor.make_host_room(num_bytes, may_wait=False):
            return None
        self.outbound.num_bytes += num_bytes
        return self._host.reserve(num_rows, num_bytes)

    def cancel(self, slab: Slab) -> None:
        """Gives back a reserved slab that will not be complete."""
        missing = self._pool.layout.num_groups - len(slab.groups)
        run_bytes = self._pool.layout.group_bytes * slab.num_rows
        self.outbound.num_bytes -= missing * run_bytes
        for _ in range(slab.num_rows):
            self._host.release_row(slab)

    def complete(
        self,
        entries: Sequence[PageEntry | None],
        slab: Slab,
        last: jax.Array,
        turn: str,
    ) -> None:
        """Takes the last layer group of a reserved slab; when it goes, its pages can be
        found there.

        Where tokens go the same way it waits for the first one, which would come after
        it: 3.5 ms late behind 160 MiB on an H200.
        """
        run = _Run(
            entries=entries, groups=[last], num_bytes=last.nbytes, turn=turn, slab=slab
        )
        if self.outbound.carries_tokens:
            self._wait(run)
        else:
            self._send(run)

    def send(self, *, may_delay: bool) -> None:
        """Sends what was taken out, as far as there is room: first what has its room.

        Args:
            may_delay: whether tokens may wait behind it.
        """
        while self._waiting and (may_delay or self._may_go(self._waiting[0])):
            if not self._has_room(self._waiting[0], may_wait=False):
                return
            self._send(self._waiting.popleft())

    def free_oldest(self) -> bool:
        """Waits for the oldest copy; without one, for room for the oldest run.

        Returns:
            False if there is neither: all that is charged is of prefills.
        """
        if self.outbound.copies:
            self.outbound.settle_oldest()
            return True
        if not self._waiting:
            return False
        run = self._waiting.popleft()
        if self._has_room(run, may_wait=True):
            self._send(run)
        else:
            self._drop(run)
        return True

    def forget(self, session: str) -> None:
        """No page of a session that waits outside its slot is wanted any more."""
        for run in self._waiting:
            for entry in filter(None, run.entries):
                if entry.session == session and entry.nearest is None:
                    self._index.remove(entry)

    def _may_go(self, run: _Run) -> bool:
        """Whether the program of the token before it has ended."""
        if not self.outbound.carries_tokens:
            return True
        return not self.outbound.is_busy and run.is_taken_out

    def _has_room(self, run: _Run, *, may_wait: bool) -> bool:
        if run.slab is not None:
            return True
        return self._evictor.make_host_room(run.num_bytes, may_wait=may_wait)

    def _wait(self, run: _Run) -> None:
        for entry in filter(None, run.entries):
            entry.is_saving = True
        if run.slab is None:
            self._waiting.append(run)
            return
        # Not behind those that wait for room, which its pages may have to make.
        num_before = sum(other.slab is not None for other in self._waiting)
        self._waiting.insert(num_before, run)

    def _send(self, run: _Run) -> None:
        """Starts the copy of a run to the room that is there for it."""
        slab, group = run.slab, self._pool.layout.num_groups - 1
        if slab is None:
            slab, group = self._host.reserve(len(run.entries), run.num_bytes), None
        try:
            self.outbound.send(slab, run.groups, run.turn, group)
        except Exception:  # out of memory, most likely
            self._counters["save_failures"] += 1
            for _ in run.entries:
                self._host.release_row(slab)
            return self._drop(run)
        self._place(run.entries, slab)

    def _drop(self, run: _Run) -> None:
        """Gives up pages that were taken out of their slots."""
        self.outbound.num_bytes -= run.num_bytes
        entries = list(filter(None, run.entries))
        self._counters["pages_not_saved"] += len(entries)
        for entry in entries:
            entry.is_saving = False
            if entry.is_lost:
                self._index.remove(entry)

    def _pass_through(self, run: _Run) -> None:
        """Host memory keeps no page at all: these pass through it to disk."""
        slab = Slab(num_rows=0, num_bytes=0, rows_left=0)
        try:
            self.outbound.send(slab, run.groups, run.turn)
        except Exception:  # out of memory, most likely
            self._counters["save_failures"] += 1
            return self._drop(run)
        for row, entry in enumerate(run.entries):
            if entry and not self._evictor.write(entry, slab.groups, row):
                self._counters["pages_not_saved"] += 1

    def _place(self, entries: Sequence[PageEntry | None], slab: Slab) -> None:
        """Makes the rows of a slab known as pages; those not wanted are given back."""
        for row, entry in enumerate(entries):
            if entry is not None:
                entry.is_saving = False
            is_known = entry is not None and self._index.find(entry.key) is entry
            is_wanted = is_known and entry is not None and entry.slab is None
            if entry is None or not is_wanted or slab.is_broken:
                self._host.release_row(slab)
                if entry is not None and entry.is_lost:
                    self._index.remove(entry)
                continue
            entry.slab, entry.row = slab, row
            self._index.place(entry, Tier.HOST)
            self._index.placement.moved("save", entry.session, 1)
