"""The pages of one turn on their way to the device, layer group by layer group.

Knows runs, copies and their order. Does not know models, nor when a group computes.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from cachedattn_jax.store.device_pool import DevicePool
from cachedattn_jax.store.disk_read import DiskRead
from cachedattn_jax.store.host_tier import Slab
from cachedattn_jax.store.link import Copy, Link
from cachedattn_jax.store.page_index import PageEntry
from cachedattn_jax.store.watcher import Watcher


@dataclass(eq=False, kw_only=True)
class Load:
    """A run of pages that travels together.

    Attributes:
        slots: int32 [run], where each page goes; past the pool for rows not needed.
        source: the slab in host memory, or the read from disk.
        entries: the pages read from disk, in order; empty for a slab.
    """

    slots: np.ndarray
    source: Slab | DiskRead
    entries: list[PageEntry] = field(default_factory=list)

    def has_group(self, group: int) -> bool:
        """Whether the run's pages of a layer group can be put on the device."""
        if isinstance(self.source, Slab):
            return self.source.copies[group].can_be_read
        return self.source.has_group(group)

    def has_come(self, group: int) -> bool:
        """Whether it is in host memory already, so that a copy of it starts at once."""
        if isinstance(self.source, Slab):
            return self.source.copies[group].has_arrived
        return self.source.has_group(group)

    def wait(self, group: int, timeout_s: float | None) -> None:
        """Waits until it can, but not longer than this."""
        if isinstance(self.source, Slab):
            self.source.copies[group].wait(timeout_s)
        else:
            self.source.wait(group, timeout_s)

    def group(self, group: int) -> np.ndarray | jax.Array:
        """The run's pages of a layer group."""
        if isinstance(self.source, Slab):
            return self.source.groups[group]
        return self.source.group(group)


class Inbound:
    """Loads of one turn; the first `num_put` layer groups are copied or being copied.

    Attributes:
        puts: the copies to the device, one for each layer group put.
        unhindered: those of them that had nothing to wait for when they were handed
            over. On CUDA a copy waits for the programs dispatched before it, in whose
            memory it may be put, and then tells nothing of the link.
        failure: what went wrong when a copy was handed to the device.
    """

    def __init__(
        self, loads: Sequence[Load], pool: DevicePool, link: Link, watcher: Watcher
    ) -> None:
        self.loads = list(loads)
        self.num_groups = pool.layout.num_groups if loads else 0
        self.puts: list[Copy] = []
        self.unhindered: list[Copy] = []
        self.failure: Exception | None = None
        self._pool = pool
        self._link = link
        self._watcher = watcher
        self._arrays: dict[int, list[jax.Array]] = {}
        self._bundles = pool.bundle([load.slots for load in self.loads])
        self._wanted = 0
        self._num_good = 0

    @property
    def num_put(self) -> int:
        return len(self.puts)

    @property
    def reads(self) -> list[Copy]:
        reads = [
            load.source for load in self.loads if isinstance(load.source, DiskRead)
        ]
        return [copy for read in reads for copy in read.copies]

    @property
    def has_failed(self) -> bool:
        """Whether a page is bad or a copy failed: the rest will not arrive."""
        # Those that arrived once need not be looked at again.
        while self._num_good < self.num_put and self.puts[self._num_good].is_good:
            self._num_good += 1
        under_way = self.puts[self._num_good :]
        if self.failure is not None or any(put.has_failed for put in under_way):
            return True
        return bool(self.bad())

    def put_through(self, num_groups: int) -> None:
        """Wants the first `num_groups` groups put, and puts those that can be."""
        self._wanted = max(self._wanted, min(num_groups, self.num_groups))
        while self.num_put < self._wanted and self._has_source(self.num_put):
            self._put(self.num_put)
            if self.failure is not None:
                return

    def has_arrived(self, group: int) -> bool:
        """Whether a layer group is on the device, or nothing is to be copied."""
        self.put_through(0)
        if group >= self.num_groups:
            return True
        return group < self.num_put and self.puts[group].has_arrived

    def is_put(self, group: int) -> bool:
        """Whether the copy of a layer group was handed to the device."""
        self.put_through(0)
        return group >= self.num_groups or group < self.num_put

    def wait(
        self, group: int, timeout_s: float | None = None, *, only_put: bool = False
    ) -> bool:
        """Waits until a layer group is on the device; whether it is.

        Args:
            timeout_s: waits no longer than this, and no longer if a page is bad.
            only_put: waits until its copy was handed to the device, and no longer.
        """
        is_there = self.is_put if only_put else self.has_arrived
        end_s = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        self.put_through(group + 1)
        while not is_there(group):
            left_s = end_s - time.monotonic()
            if left_s <= 0 or self.has_failed:
                return False
            limit_s = None if timeout_s is None else left_s
            if self.num_put > group:
                self.puts[group].wait(limit_s)
            else:
                self._wait_source(self.num_put, limit_s)
        return True

    def install(self, group: int) -> list[jax.Array]:
        """Writes a layer group that was put into its slots; see `DevicePool.install`"""
        runs = self._arrays.pop(group, [])
        return self._pool.install(group, runs, self._bundles if runs else [])

    def bad(self) -> dict[str, list[PageEntry]]:
        """Pages that were found bad until now, by reason.

        Only those that are wanted: a run that is fetched brings others, too, and would
        be found bad again and again by turns that do without them.
        """
        found: dict[str, list[PageEntry]] = {}
        for load in self.loads:
            if isinstance(load.source, DiskRead):
                for index, reason in load.source.bad().items():
                    if load.slots[index] < self._pool.num_slots:
                        found.setdefault(reason, []).append(load.entries[index])
        return found

    def _has_source(self, group: int) -> bool:
        is_here = all(load.has_group(group) for load in self.loads)
        return is_here and not self.has_failed

    def _wait_source(self, group: int, timeout_s: float | None) -> None:
        for load in self.loads:
            if not load.has_group(group):
                return load.wait(group, timeout_s)

    def _put(self, group: int) -> None:
        is_free = self._pool.is_idle and all(run.has_come(group) for run in self.loads)
        runs = [load.group(group) for load in self.loads]
        try:
            if group == 0:
                arrays, self._bundles = self._pool.put_with_slots(runs, self._bundles)
            else:
                arrays = self._pool.put(runs)
        except Exception as error:  # out of memory, most likely: computing may do
            self.failure = error
            return
        self._arrays[group] = arrays
        num_bytes = sum(array.nbytes for array in arrays)
        self.puts.append(self._link.carry(num_bytes, self._watcher.watch(arrays)))
        if is_free or self._link.emulated is not None:
            self.unhindered.append(self.puts[-1])
