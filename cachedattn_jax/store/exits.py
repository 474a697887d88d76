"""Pages leave a tier, one by one: what the tier, the index and the counters hear of it.

Knows where a page is in each tier. Does not know why it leaves, or what has room.
"""

from collections import Counter

from cachedattn_jax.store.device_pool import DevicePool
from cachedattn_jax.store.disk_tier import DiskTier
from cachedattn_jax.store.host_tier import HostTier
from cachedattn_jax.store.page_index import PageEntry, PageIndex
from cachedattn_jax.store.placement.tier import Tier


class Exits:
    """Takes pages out of tiers."""

    def __init__(
        self,
        index: PageIndex,
        pool: DevicePool,
        host: HostTier,
        disk: DiskTier | None,
        counters: Counter[str],
    ) -> None:
        self._index = index
        self._pool = pool
        self._host = host
        self._disk = disk
        self._counters = counters

    def evict(self, entry: PageEntry, tier: Tier, reason: str) -> None:
        """Takes the page, which is not held, out of a tier, and counts why."""
        match tier:
            case Tier.DEVICE:
                self._pool.give_back(self.leave_device(entry))
            case Tier.HOST:
                self.leave_host(entry)
            case Tier.DISK:
                self.leave_disk(entry)
        self._counters[f"pages_left_{tier}"] += 1
        self._counters[f"evicted_{tier}_{reason}"] += 1
        if entry.is_lost:
            self._counters[f"pages_lost_from_{tier}"] += 1

    def leave_device(self, entry: PageEntry) -> int:
        """Takes the page from its slot, which is returned and belongs to the caller."""
        slot = entry.slot
        assert slot is not None
        entry.slot = None
        self._index.unplace(entry, Tier.DEVICE)
        return slot

    def leave_disk(self, entry: PageEntry) -> None:
        """Deletes the page's object, if there is one."""
        if entry.on_disk:
            assert self._disk is not None
            entry.on_disk = False
            self._disk.delete(entry)
            self._index.unplace(entry, Tier.DISK)

    def leave_host(self, entry: PageEntry) -> None:
        """Gives up the page's row in host memory, if it has one."""
        if entry.slab is not None:
            self._host.release_row(entry.slab)
            entry.slab = None
            self._index.unplace(entry, Tier.HOST)
