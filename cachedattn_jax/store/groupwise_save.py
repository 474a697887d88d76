"""Pages of one prefill that leave the device layer group by layer group.

Knows runs and groups. Does not know where there is room for them. Paper, section 3.2.2.
"""

from collections.abc import Sequence

from cachedattn_jax.store.device_pool import RUN_PAGES, DevicePool
from cachedattn_jax.store.host_tier import Slab
from cachedattn_jax.store.page_index import PageEntry
from cachedattn_jax.store.saver import Saver


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
        saver: Saver,
        pool: DevicePool,
        pages: range,
        slots: Sequence[int],
        turn: str,
    ) -> None:
        self._saver = saver
        self._pool = pool
        self._turn = turn
        self._runs: list[tuple[range, list[int], Slab]] = []
        size = max(RUN_PAGES)
        for start in range(0, len(pages) - size + 1, size):
            slab = saver.reserve(size)
            if slab is None:
                break
            run = slice(start, start + size)
            self._runs.append((pages[run], list(slots[run]), slab))

    @property
    def num_bytes(self) -> int:
        return sum(slab.num_bytes for _, _, slab in self._runs)

    def save(self, group: int) -> None:
        """Copies out a layer group whose last program was dispatched."""
        outbound = self._saver.outbound
        for _, slots, slab in self._runs:
            run = self._pool.extract_group(group, slots, to_host=outbound.is_direct)
            outbound.send(slab, [run], self._turn, group)

    def finish(self, entries: Sequence[PageEntry | None]) -> None:
        """The prefill is dispatched: its pages can be found in host memory, too."""
        for pages, _, slab in self._runs:
            self._saver.place([entries[page] for page in pages], slab)
        self._runs = []

    def abandon(self) -> None:
        """The prefill will not end; what was saved of it is worth nothing."""
        for _, _, slab in self._runs:
            self._saver.cancel(slab)
        self._runs = []
