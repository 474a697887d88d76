"""Pages of one prefill that leave the device layer group by layer group.

Knows runs and groups. Does not know where there is room for them. Paper, section 3.2.2.
"""

from collections.abc import Iterator, Sequence

import jax

from cachedattn_jax.store.departures import Departures
from cachedattn_jax.store.device_pool import RUN_PAGES, DevicePool
from cachedattn_jax.store.host_tier import Slab
from cachedattn_jax.store.page_index import PageEntry


class GroupwiseSave:
    """Saves new pages while their prefill computes, as far as there is room.

    Only whole runs of the largest size: for fewer pages the many small programs would
    cost the prefill more than saving them later costs the decode.

    Args:
        pages: which pages of the turn are new and will be full.
        slots: where they are.
        turn: the name under which events note it.
    """

    def __init__(
        self,
        departures: Departures,
        pool: DevicePool,
        pages: range,
        slots: Sequence[int],
        turn: str,
    ) -> None:
        self._departures = departures
        self._pool = pool
        self._turn = turn
        self._runs: list[tuple[range, list[int], Slab]] = []
        size = max(RUN_PAGES)
        for start in range(0, len(pages) - size + 1, size):
            slab = departures.reserve(size)
            if slab is None:
                break
            run = slice(start, start + size)
            self._runs.append((pages[run], list(slots[run]), slab))

    @property
    def num_bytes(self) -> int:
        return sum(slab.num_bytes for _, _, slab in self._runs)

    def save(self, group: int) -> None:
        """Copies out a layer group, not the last, whose last program was dispatched."""
        for (_, _, slab), run in zip(self._runs, self._taken_out(group), strict=True):
            self._departures.outbound.send(slab, [run], self._turn, group)

    def finish(self, entries: Sequence[PageEntry | None]) -> None:
        """The prefill is dispatched: the last layer group may go, and with it the pages
        can be found in host memory, too.
        """
        # All of it before the first is complete, and can be abandoned no more.
        taken_out = list(self._taken_out(self._pool.layout.num_groups - 1))
        for (pages, _, slab), last in zip(self._runs, taken_out, strict=True):
            of_run = [entries[page] for page in pages]
            self._departures.complete(of_run, slab, last, self._turn)
        self._runs = []

    def abandon(self) -> None:
        """The prefill will not end; what was saved of it is worth nothing."""
        for _, _, slab in self._runs:
            self._departures.cancel(slab)
        self._runs = []

    def _taken_out(self, group: int) -> Iterator[jax.Array]:
        to_host = self._departures.outbound.is_direct
        for _, slots, _ in self._runs:
            yield self._pool.extract_group(group, slots, to_host=to_host)
