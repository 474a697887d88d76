"""Pages leaving the device: a bounded buffer between slots and host memory.

Knows what is to be saved and what waits for room. Does not know turns, which page ought
to leave, or how a copy goes. Paper, section 3.2.2: what is not saved yet when a turn
ends stays in the buffer, so that the next one does not wait.
"""

import time
from collections import Counter
from collections.abc import Iterable, Sequence

from cachedattn_jax.store.budget import SAVED_TOGETHER
from cachedattn_jax.store.departures import Departures
from cachedattn_jax.store.device_pool import DevicePool, split_runs
from cachedattn_jax.store.evictor import Evictor
from cachedattn_jax.store.host_tier import HostTier
from cachedattn_jax.store.link import Copy
from cachedattn_jax.store.outbound import Outbound
from cachedattn_jax.store.page_index import PageEntry, PageIndex


class Saver:
    """Copies new pages out of the device, each of them once.

    Args:
        outbound: takes the copies, and bounds them and the pages that wait for room.

    Attributes:
        departures: takes pages out of their slots and sends them.
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
        self.departures = Departures(index, pool, host, evictor, outbound, counters)
        self._index = index
        self._page_bytes = pool.layout.page_bytes
        self._host = host
        self._evictor = evictor
        self._outbound = outbound
        self._counters = counters
        # By turn: the rows of a slab go together if they belong to one conversation.
        self._queue: dict[str, dict[bytes, PageEntry]] = {}
        self._begun: set[str] = set()  # of these turns, all that is queued is saved
        self._no_room_at: tuple[int, int] | None = None

    @property
    def under_way(self) -> list[Copy]:
        return self._outbound.copies

    @property
    def buffered_bytes(self) -> int:
        """Of copies under way and pages that wait for room."""
        return self._outbound.num_bytes

    @property
    def delays_tokens(self) -> bool:
        """Whether tokens wait behind pages that are under way.

        With one step in flight the device would wait for a host that waits for them.
        """
        return self._outbound.carries_tokens and bool(self.under_way)

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
        self._outbound.settle()
        self.departures.send(may_delay=False)
        if self._outbound.is_busy or self._no_room_at == self._room():
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
            self.departures.send(may_delay=True)
            for begun in list(self._begun):
                self._save_queued(begun, may_delay=True)

    def _save_queued(self, turn: str, *, may_delay: bool) -> bool:
        """Starts saving queued pages, if there is room; whether there was for all.

        What found no room stays in the queue and is saved later, when its slot is
        needed at the latest.
        """
        wanted = _unsaved(self._queue.pop(turn, {}).values())
        for run in split_runs(wanted):
            fits = self._outbound.fits(len(run) * self._page_bytes)
            fits = fits and (may_delay or not self._outbound.is_busy)
            if not fits or not self._take_out(run, turn):
                self.ask(wanted, turn)
                return False
        self._begun.discard(turn)
        return True

    def _take_out(self, run: list[PageEntry], turn: str) -> bool:
        if self.departures.take_out(run, turn):
            return True
        # Writes under way may make room at any time, so then it is tried again.
        self._no_room_at = None if self._evictor.has_disk else self._room()
        return False

    def save_now(self, entries: Sequence[PageEntry], turn: str = "") -> None:
        """Copies pages out of their slots, which are free for others then.

        Waits only for room in the buffer; saves nothing for which there is none at all.
        """
        if any(entry.is_saving for entry in entries):
            # Where they are taken out they cannot be found.
            self.departures.send(may_delay=True)
        for run in split_runs(_unsaved(entries)):
            self._make_buffer_room(len(run) * self._page_bytes)
            self.departures.take_out(run, turn, may_wait=True)

    def drain(self) -> None:
        """Saves all that is queued and waits until every copy has arrived."""
        for turn in list(self._queue):
            self.save_now(list(self._queue.pop(turn).values()), turn)
        self._begun.clear()
        started_s = time.monotonic()
        while self.departures.free_oldest():
            pass
        self._counters["save_wait_us"] += int(1e6 * (time.monotonic() - started_s))

    def _room(self) -> tuple[int, int]:
        """While this stays the same, nothing has left host memory, nor may it now.

        Looking for room that is not there takes 0.1 ms of a step.
        """
        return self._host.used_bytes, self._index.placement.room.running_host_bytes

    def _make_buffer_room(self, num_bytes: int) -> None:
        started_s = time.monotonic()
        self._outbound.settle()
        self.departures.send(may_delay=True)
        # What prefills have reserved is not waited for: they may wait for this.
        while not self._outbound.fits(num_bytes) and self.departures.free_oldest():
            pass
        self._counters["save_wait_us"] += int(1e6 * (time.monotonic() - started_s))


def _unsaved(entries: Iterable[PageEntry]) -> list[PageEntry]:
    return [e for e in entries if e.slot is not None and not e.is_saved]
