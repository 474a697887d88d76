"""The pages one running turn uses: its slots, and what must still be copied into them.

Knows slots, runs and arrivals. Does not know why a page is where it is.
"""

from concurrent.futures import Future, wait
from dataclasses import dataclass, field

import jax
import numpy as np

from cachedattn_jax.store.disk_tier import DiskRead
from cachedattn_jax.store.host_tier import Slab
from cachedattn_jax.store.page_index import PageEntry
from cachedattn_jax.store.placement import Tier


@dataclass(eq=False, kw_only=True)
class Load:
    """A run of pages on its way to the device.

    Attributes:
        slots: int32 [run], where each page goes; past the pool for rows not needed.
        source: the slab in host memory, or the read from disk.
        entries: the pages read from disk, in order; empty for a slab.
    """

    slots: np.ndarray
    source: "Slab | Future[DiskRead]"
    entries: list[PageEntry] = field(default_factory=list)

    @property
    def is_ready(self) -> bool:
        return isinstance(self.source, Slab) or self.source.done()

    def group(self, group: int) -> np.ndarray | jax.Array:
        """The run's pages of one layer group; waits for a read under way."""
        if isinstance(self.source, Slab):
            return self.source.groups[group]
        return self.source.result().groups[group]


@dataclass(eq=False, kw_only=True)
class Lease:
    """What a turn holds from its start to its end.

    Attributes:
        session: the session whose turn it is.
        slots: int32 [pages], the page table of the turn, whole from the start.
        entries: the indexed page behind each slot, None where the slot is the turn's
            own.
        cached_tokens: tokens of the prompt whose keys and values need no computing.
        tokens_from: the same by the tier they came from.
        loads: what must be installed before they can be used.
    """

    session: str
    slots: np.ndarray
    entries: list[PageEntry | None]
    cached_tokens: int
    tokens_from: dict[Tier, int]
    loads: list[Load]

    @property
    def is_ready(self) -> bool:
        """Whether every page has at least reached host memory."""
        return all(load.is_ready for load in self.loads)

    def wait(self, timeout_s: float) -> None:
        """Waits until it is ready, but not longer than this."""
        reads = [load.source for load in self.loads if isinstance(load.source, Future)]
        wait(reads, timeout_s)
