"""Pages leaving the device: a bounded buffer between slots and host memory.

Knows what is to be saved, what is on its way, and the bound. Does not know turns, or
which page ought to leave. Paper, section 3.2.2: what is not saved yet when a turn ends
stays in the buffer, so that the next one does not wait.
"""

import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax

from cachedattn_jax.store.budget import SAVED_TOGETHER
from cachedattn_jax.store.device_pool import DevicePool, split_runs
from cachedattn_jax.store.evictor import Evictor
from cachedattn_jax.store.exits import Exits
from cachedattn_jax.store.host_tier import HostTier, Slab
from cachedattn_jax.store.link import Copy, Links
from cachedattn_jax.store.page_index import PageEntry, PageIndex
from cachedattn_jax.store.placement.tier import Tier
from cachedattn_jax.store.watcher import Watcher
from cachedattn_jax.timeline import Timeline


@dataclass(eq=False, kw_only=True)
class _Flight:
    """A copy under way to host memory, and what it carries."""

    copy: Copy
    num_bytes: int
    turn: str
    group: int | None
    slab: Slab


@dataclass(eq=False, kw_only=True)
class _Run:
    """Pages taken out of their slots that wait for room in host memory."""

    entries: list[PageEntry]
    groups: list[jax.Array]
    num_bytes: int


class Saver:
    """Copies new pages out of the device, each of them once.

    Args:
        capacity_bytes: of copies under way and pages that wait for room; all of it is
            device memory.
    """

    def __init__(
        self,
        index: PageIndex,
        pool: DevicePool,
        host: HostTier,
        evictor: Evictor,
        exits: Exits,
        links: Links,
        watchers: "dict[str, Watcher]",
        timeline: Timeline,
        counters: Counter[str],
        capacity_bytes: int,
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self.buffered_bytes = 0
        self._index = index
        self._pool = pool
        self._host = host
        self._evictor = evictor
        self._exits = exits
        self._links = links
        self._watchers = watchers
        self._timeline = timeline
        self._counters = counters
        # By turn: the rows of a slab go together if they belong to one conversation.
        self._queue: dict[str, dict[bytes, PageEntry]] = {}
        self._flights: deque[_Flight] = deque()
        self._waiting: deque[_Run] = deque()

    @property
    def under_way(self) -> list[Copy]:
        return [flight.copy for flight in self._flights]

    def ask(self, entries: Iterable[PageEntry], turn: str) -> int:
        """Puts pages of a turn in the queue of those to be saved; how many are new."""
        queue = self._queue.setdefault(turn, {})
        before = len(queue)
        queue.update((entry.key, entry) for entry in _unsaved(entries))
        num_new = len(queue) - before
        if not queue:
            del self._queue[turn]
        return num_new

    def poll(self) -> None:
        """Starts saving queued pages of turns that have some; never waits."""
        self._settle()
        self._admit_waiting()
        for turn in [t for t, q in self._queue.items() if len(q) >= SAVED_TOGETHER]:
            if not self.save_queued(turn):
                return

    def save_queued(self, turn: str) -> bool:
        """Starts saving all queued pages of a turn, if there is room; whether it was.

        What found no room stays in the queue and is saved later, when its slot is
        needed at the latest.
        """
        wanted = _unsaved(self._queue.pop(turn, {}).values())
        for run in split_runs(wanted):
            fits = self._fits(len(run) * self._pool.layout.page_bytes)
            if not fits or not self._save(run, turn, may_wait=False):
                self.ask(wanted, turn)
                return False
        return True

    def save_now(self, entries: Sequence[PageEntry], turn: str = "") -> None:
        """Copies pages out of their slots, which are free for others then.

        Waits only for room in the buffer; saves nothing for which there is none at all.
        """
        for run in split_runs(_unsaved(entries)):
            self._make_buffer_room(len(run) * self._pool.layout.page_bytes)
            self._save(run, turn, may_wait=True)

    def drain(self) -> None:
        """Saves all that is queued and waits until every copy has arrived."""
        for turn in list(self._queue):
            self.save_now(list(self._queue.pop(turn).values()), turn)
        started_s = time.monotonic()
        while self._flights or self._waiting:
            self._free_oldest()
        self._counters["save_wait_us"] += int(1e6 * (time.monotonic() - started_s))

    def reserve(self, num_rows: int) -> Slab | None:
        """Room in the buffer and in host memory for a run; None if there is none now.

        Its pages are copied with `send` and become known with `place`.
        """
        num_bytes = num_rows * self._pool.layout.page_bytes
        if not self._fits(num_bytes):
            return None
        if not self._evictor.make_host_room(num_bytes, may_wait=False):
            return None
        self.buffered_bytes += num_bytes
        return self._host.reserve(num_rows, num_bytes)

    def cancel(self, slab: Slab) -> None:
        """Gives back a reserved slab that will not be complete."""
        missing = self._pool.layout.num_groups - len(slab.groups)
        run_bytes = self._pool.layout.group_bytes * slab.num_rows
        self.buffered_bytes -= missing * run_bytes
        for _ in range(slab.num_rows):
            self._host.release_row(slab)

    def send(
        self, slab: Slab, runs: list[jax.Array], turn: str, group: int | None = None
    ) -> None:
        """Starts the copy of the next layer groups of a slab to host memory.

        Args:
            runs: extracted pages, an array a group.
            turn, group: how events note it; `group` where it is one.
        """
        is_emulated = self._links.device_to_host.emulated is not None
        on_host = self._pool.put_on_host(runs, is_emulated=is_emulated)
        after = self._watchers["compute"].watch(runs)
        done = self._watchers["device-to-host"].watch(on_host)
        num_bytes = sum(run.nbytes for run in runs)
        copy = self._links.device_to_host.carry(num_bytes, done, after)
        slab.groups += on_host
        slab.copies += [copy] * len(on_host)
        self._counters["bytes_device_to_host"] += num_bytes
        self._flights.append(
            _Flight(copy=copy, num_bytes=num_bytes, turn=turn, group=group, slab=slab)
        )

    def place(self, entries: Sequence[PageEntry | None], slab: Slab) -> None:
        """Makes the rows of a slab known as pages; those not wanted are given back."""
        for row, entry in enumerate(entries):
            if entry is not None:
                entry.is_saving = False
            is_known = entry is not None and self._index.find(entry.key) is entry
            is_wanted = is_known and entry is not None and entry.slab is None
            if entry is None or not is_wanted or slab.is_broken:
                self._host.release_row(slab)
                continue
            entry.slab, entry.row = slab, row
            self._index.place(entry, Tier.HOST)
            self._index.placement.moved("save", entry.session, 1)

    def _fits(self, num_bytes: int) -> bool:
        """Whether the buffer takes so many bytes; an empty one takes any."""
        is_empty = self.buffered_bytes == 0
        return is_empty or self.buffered_bytes + num_bytes <= self.capacity_bytes

    def _save(self, entries: list[PageEntry], turn: str, *, may_wait: bool) -> bool:
        """Whether the pages were taken out of the pool."""
        num_bytes = len(entries) * self._pool.layout.page_bytes
        has_room = self._evictor.make_host_room(num_bytes, may_wait=False)
        can_ever = num_bytes <= self._host.capacity_bytes
        if not has_room and can_ever and not may_wait:
            return False
        if not has_room and not can_ever and not self._evictor.has_disk:
            self._counters["pages_not_saved"] += len(entries)
            return True
        try:
            groups = self._pool.extract([e.slot for e in entries if e.slot is not None])
        except Exception:  # out of memory, most likely: they are not saved
            self._counters["save_failures"] += 1
            return True
        run = _Run(entries=entries, groups=groups, num_bytes=num_bytes)
        self.buffered_bytes += num_bytes
        if has_room:
            self._admit(run, turn)
        elif can_ever:
            for entry in entries:
                entry.is_saving = True
            self._waiting.append(run)
        else:
            self._pass_through(run, turn)
        return True

    def _admit(self, run: _Run, turn: str) -> None:
        slab = self._host.reserve(len(run.entries), run.num_bytes)
        try:
            self.send(slab, run.groups, turn)
        except Exception:  # out of memory, most likely
            self._counters["save_failures"] += 1
            for _ in run.entries:
                self._host.release_row(slab)
            return self._drop(run)
        self.place(run.entries, slab)

    def _drop(self, run: _Run) -> None:
        """Gives up pages that were taken out of their slots."""
        self.buffered_bytes -= run.num_bytes
        self._counters["pages_not_saved"] += len(run.entries)
        for entry in run.entries:
            entry.is_saving = False
            if entry.is_lost:
                self._index.remove(entry)

    def _pass_through(self, run: _Run, turn: str) -> None:
        """Host memory keeps no page at all: these pass through it to disk."""
        slab = Slab(num_rows=0, num_bytes=0, rows_left=0)
        try:
            self.send(slab, run.groups, turn)
        except Exception:  # out of memory, most likely
            self._counters["save_failures"] += 1
            return self._drop(run)
        for row, entry in enumerate(run.entries):
            if not self._evictor.write(entry, slab.groups, row):
                self._counters["pages_not_saved"] += 1

    def _settle(self) -> None:
        while self._flights and self._flights[0].copy.has_ended:
            self._land(self._flights.popleft())

    def _land(self, flight: _Flight) -> None:
        self.buffered_bytes -= flight.num_bytes
        if flight.copy.has_failed:
            self._counters["save_failures"] += 1
            flight.slab.is_broken = True
            for entry in list(self._index.in_tier(Tier.HOST)):
                if entry.slab is flight.slab:
                    self._exits.leave_host(entry)
            return
        start_s, end_s = flight.copy.span
        self._counters["us_device_to_host"] += int(1e6 * (end_s - start_s))
        details = {"bytes": flight.num_bytes, "turn": flight.turn}
        if flight.group is not None:
            details["group"] = flight.group
        self._timeline.add("save", "device to host", start_s, end_s, **details)

    def _admit_waiting(self) -> None:
        while self._waiting and self._evictor.make_host_room(
            self._waiting[0].num_bytes, may_wait=False
        ):
            self._admit(self._waiting.popleft(), "")

    def _make_buffer_room(self, num_bytes: int) -> None:
        started_s = time.monotonic()
        self._settle()
        self._admit_waiting()
        while not self._fits(num_bytes):
            self._free_oldest()
        self._counters["save_wait_us"] += int(1e6 * (time.monotonic() - started_s))

    def _free_oldest(self) -> None:
        """Waits for the oldest copy; without one, for room for the oldest run."""
        if self._flights:
            self._flights[0].copy.wait()
            self._settle()
            return
        run = self._waiting.popleft()
        if self._evictor.make_host_room(run.num_bytes, may_wait=True):
            self._admit(run, "")
        else:
            self._drop(run)


def _unsaved(entries: Iterable[PageEntry]) -> list[PageEntry]:
    return [e for e in entries if e.slot is not None and not e.is_saved]
