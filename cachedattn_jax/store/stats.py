"""What a store counted, sorted by what the numbers mean.

Knows names of counters. Does not know who counts, or how numbers are shown.
"""

from collections import Counter
from dataclasses import dataclass

from cachedattn_jax.store.catalog import Catalog
from cachedattn_jax.store.device_pool import DevicePool
from cachedattn_jax.store.disk_tier import DiskTier
from cachedattn_jax.store.host_tier import HostTier
from cachedattn_jax.store.objects.root import Root
from cachedattn_jax.store.page_index import PageIndex
from cachedattn_jax.store.placement.tier import Tier


@dataclass(frozen=True, kw_only=True)
class StoreStats:
    """The state of a store and what has happened since it was opened.

    Attributes:
        used_bytes, capacity_bytes: by tier.
        misses: pages that were stored and could not be used, by reason.
        evictions: pages by (tier they left, reason).
        lost: pages by the tier they were lost from: they are in no other.
        bytes_moved, seconds_moving: by direction, such as "host_to_disk".
        operations: on the disk root: reads and writes.
        failures: of them, by (operation, reason).
        corruptions: objects found bad, by reason.
        quarantined: objects moved away because they were bad.
        breakers: state by operation: closed, open or trying.
        records_unstored: session records that are not on disk yet.
        others: all other counters.
    """

    used_bytes: dict[str, int]
    capacity_bytes: dict[str, int]
    sessions: int
    held_pages: int
    misses: dict[str, int]
    evictions: dict[tuple[str, str], int]
    lost: dict[str, int]
    bytes_moved: dict[str, int]
    seconds_moving: dict[str, float]
    operations: dict[str, int]
    failures: dict[tuple[str, str], int]
    corruptions: dict[str, int]
    quarantined: int
    breakers: dict[str, str]
    records_unstored: int
    others: dict[str, int]

    def describe(self) -> dict[str, object]:
        """The same for JSON: pairs become "first/second"."""
        return {
            name: {"/".join(k) if isinstance(k, tuple) else k: v for k, v in d.items()}
            if isinstance(d, dict)
            else d
            for name, d in vars(self).items()
        }


_DIRECTIONS = (
    *("device_to_host", "host_to_disk"),
    *("disk_to_host", "host_to_device"),
)


def sort_counters(counters: Counter[str]) -> dict[str, dict]:
    """Counters by what they mean; see `StoreStats`."""
    rest = dict(counters)

    def take(prefix: str) -> dict[str, int]:
        found = {n: v for n, v in rest.items() if n.startswith(prefix)}
        for name in found:
            del rest[name]
        return {n.removeprefix(prefix): v for n, v in found.items() if v}

    misses = {**take("miss_"), **take("pages_passed_")}
    evictions = {tuple(n.split("_", 1)): v for n, v in take("evicted_").items()}
    failures = {
        (operation, reason): count
        for operation in ("read", "write")
        for reason, count in take(f"{operation}_failed_").items()
    }
    return {
        "misses": misses,
        "evictions": evictions,
        "lost": take("pages_lost_from_"),
        "bytes_moved": {d: rest.pop(f"bytes_{d}", 0) for d in _DIRECTIONS},
        "seconds_moving": {d: rest.pop(f"us_{d}", 0) / 1e6 for d in _DIRECTIONS},
        "operations": {o: rest.pop(f"{o}_operations", 0) for o in ("read", "write")},
        "failures": failures,
        "corruptions": take("corrupt_"),
        "others": rest,
    }


def gather(
    pool: DevicePool,
    host: HostTier,
    disk: DiskTier | None,
    root: Root | None,
    index: PageIndex,
    catalog: Catalog,
    counters: Counter[str],
) -> StoreStats:
    """The state of the parts of a store, and what they have counted."""
    counters = counters.copy()
    breakers: dict[str, str] = {}
    if root is not None:
        counters += root.kv.counters
        counters += root.cache.counters if root.cache else Counter()
        breakers = {"read": root.kv.reading.state, "write": root.kv.writing.state}
    page_bytes = pool.layout.page_bytes
    held = (entry.holds > 0 for tier in Tier for entry in index.in_tier(tier))
    return StoreStats(
        used_bytes={
            "device": (pool.num_slots - pool.num_free) * page_bytes,
            "host": host.used_bytes,
            "disk": disk.used_bytes if disk else 0,
        },
        capacity_bytes={
            "device": pool.num_slots * page_bytes,
            "host": host.capacity_bytes,
            "disk": disk.capacity_bytes if disk else 0,
        },
        sessions=catalog.num_sessions,
        held_pages=sum(held),
        quarantined=counters.pop("quarantined", 0),
        breakers=breakers,
        records_unstored=catalog.num_unstored,
        **sort_counters(counters),
    )
