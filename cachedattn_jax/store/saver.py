"""Pages leaving the device: a bounded buffer between slots and host memory.

Knows what is to be saved and what waits for room. Does not know turns, which page ought
to leave, or how a copy goes. Paper, section 3.2.2: what is not saved yet when a turn
ends stays in the buffer, so that the next one does not wait.
"""

import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax

from cachedattn_jax.store.budget import SAVED_TOGETHER
from cachedattn_jax.store.device_pool import DevicePool, split_runs
from cachedattn_jax.store.evictor import Evictor
from cachedattn_jax.store.host_tier import HostTier, Slab
from cachedattn_jax.store.link import Copy
from cachedattn_jax.store.outbound import Outbound
from cachedattn_jax.store.page_index import PageEntry, PageIndex
from cachedattn_jax.store.placement.tier import Tier


@dataclass(eq=False, kw_only=True)
class _Run:
    """Pages taken out of their slots that wait for room in host memory."""

    entries: list[PageEntry]
    groups: list[jax.Array]
    num_bytes: int


class Saver:
    """Copies new pages out of the device, each of them once.

    Args:
        outbound: takes the copies, and bounds them and the pages that wait for room.
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
        self._index = index
        self._pool = pool
        self._host = host
        self._evictor = evictor
        self.outbound = outbound
        self._counters = counters
        # By turn: the rows of a slab go together if they belong to one conversation.
        self._queue: dict[str, dict[bytes, PageEntry]] = {}
        self._begun: set[str] = set()  # of these turns, all that is queued is saved
        self._waiting: deque[_Run] = deque()
        self._no_room_at: tuple[int, int] | None = None

    @property
    def under_way(self) -> list[Copy]:
        return self.outbound.copies

    @property
    def buffered_bytes(self) -> int:
        """Of copies under way and pages that wait for room."""
        return self.outbound.num_bytes

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
        """Starts saving queued pages of turns that have some; never waits.

        As many as do not get in the way of tokens: see `Outbound.is_busy`.
        """
        self.outbound.settle()
        self._admit_waiting()
        if self.outbound.is_busy or self._no_room_at == self._room():
            return
        for turn, queue in list(self._queue.items()):
            if len(queue) >= SAVED_TOGETHER:
                self._begun.add(turn)
            if turn in self._begun and not self._save_queued(turn, may_delay=False):
                return

    def finish(self, turn: str, *, at_once: bool) -> None:
        """Lets all that is queued of a turn leave, however little it is.

        Args:
            at_once: what is queued of the turns that ended before it, too. Otherwise
                `poll` starts them, behind the tokens of those that run.
        """
        if turn in self._queue:
            self._begun.add(turn)
        if at_once:
            for begun in list(self._begun):
                self._save_queued(begun, may_delay=True)

    def _save_queued(self, turn: str, *, may_delay: bool) -> bool:
        """Starts saving queued pages, if there is room; whether there was for all.

        What found no room stays in the queue and is saved later, when its slot is
        needed at the latest.
        """
        wanted = _unsaved(self._queue.pop(turn, {}).values())
        for run in split_runs(wanted):
            fits = self.outbound.fits(len(run) * self._pool.layout.page_bytes)
            fits = fits and (may_delay or not self.outbound.is_busy)
            if not fits or not self._save(run, turn, may_wait=False):
                self.ask(wanted, turn)
                return False
        self._begun.discard(turn)
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
        self._begun.clear()
        started_s = time.monotonic()
        while self.under_way or self._waiting:
            self._free_oldest()
        self._counters["save_wait_us"] += int(1e6 * (time.monotonic() - started_s))

    def reserve(self, num_rows: int) -> Slab | None:
        """Room in the buffer and in host memory for a run; None if there is none now.

        Its pages are copied with `Outbound.send` and become known with `place`.
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

    def _save(self, entries: list[PageEntry], turn: str, *, may_wait: bool) -> bool:
        """Whether the pages were taken out of the pool."""
        num_bytes = len(entries) * self._pool.layout.page_bytes
        has_room = self._evictor.make_host_room(num_bytes, may_wait=False)
        can_ever = num_bytes <= self._host.capacity_bytes
        if not has_room and can_ever and not may_wait:
            # Writes under way may make room at any time, so then it is tried again.
            self._no_room_at = None if self._evictor.has_disk else self._room()
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
        run = _Run(entries=entries, groups=groups, num_bytes=num_bytes)
        self.outbound.num_bytes += num_bytes
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
            self.outbound.send(slab, run.groups, turn)
        except Exception:  # out of memory, most likely
            self._counters["save_failures"] += 1
            for _ in run.entries:
                self._host.release_row(slab)
            return self._drop(run)
        self.place(run.entries, slab)

    def _drop(self, run: _Run) -> None:
        """Gives up pages that were taken out of their slots."""
        self.outbound.num_bytes -= run.num_bytes
        self._counters["pages_not_saved"] += len(run.entries)
        for entry in run.entries:
            entry.is_saving = False
            if entry.is_lost:
                self._index.remove(entry)

    def _pass_through(self, run: _Run, turn: str) -> None:
        """Host memory keeps no page at all: these pass through it to disk."""
        slab = Slab(num_rows=0, num_bytes=0, rows_left=0)
        try:
            self.outbound.send(slab, run.groups, turn)
        except Exception:  # out of memory, most likely
            self._counters["save_failures"] += 1
            return self._drop(run)
        for row, entry in enumerate(run.entries):
            if not self._evictor.write(entry, slab.groups, row):
                self._counters["pages_not_saved"] += 1

    def _room(self) -> tuple[int, int]:
        """While this stays the same, nothing has left host memory, nor may it now.

        Looking for room that is not there takes 0.1 ms of a step.
        """
        return self._host.used_bytes, self._index.placement.room.running_host_bytes

    def _admit_waiting(self) -> None:
        while self._waiting and self._evictor.make_host_room(
            self._waiting[0].num_bytes, may_wait=False
        ):
            self._admit(self._waiting.popleft(), "")

    def _make_buffer_room(self, num_bytes: int) -> None:
        started_s = time.monotonic()
        self.outbound.settle()
        self._admit_waiting()
        while not self.outbound.fits(num_bytes):
            self._free_oldest()
        self._counters["save_wait_us"] += int(1e6 * (time.monotonic() - started_s))

    def _free_oldest(self) -> None:
        """Waits for the oldest copy; without one, for room for the oldest run."""
        if self.outbound.copies:
            self.outbound.settle_oldest()
            return
        run = self._waiting.popleft()
        if self._evictor.make_host_room(run.num_bytes, may_wait=True):
            self._admit(run, "")
        else:
            self._drop(run)


def _unsaved(entries: Iterable[PageEntry]) -> list[PageEntry]:
    return [e for e in entries if e.slot is not None and not e.is_saved]
