"""Opens the root and the disk tier that a store's settings ask for.

Knows settings. Does not know what lies there.
"""

import numpy as np

from cachedattn_jax.store.budget import StoreConfig
from cachedattn_jax.store.disk_tier import DiskTier
from cachedattn_jax.store.layout import Layout
from cachedattn_jax.store.link import Links
from cachedattn_jax.store.objects.faults import Faults
from cachedattn_jax.store.objects.root import CacheFolder, Root
from cachedattn_jax.store.objects.salts import Salts


def open_root(
    config: StoreConfig, layout: Layout, salts: Salts, faults: Faults | None
) -> Root | None:
    """The root with its read cache; None without a `disk_root`."""
    if not config.disk_root:
        return None
    cache = None
    if config.cache_root and config.num_cache_bytes:
        cache = CacheFolder(config.cache_root, config.num_cache_bytes)
    return Root(config.disk_root, layout, config.io, salts, faults=faults, cache=cache)


def open_disk(
    config: StoreConfig,
    root: Root | None,
    layout: Layout,
    dtype: np.dtype,
    links: Links,
) -> DiskTier | None:
    """The disk tier; None without a budget; ValueError for a budget without a root."""
    num_bytes = config.num_disk_bytes
    if num_bytes and root is None:
        raise ValueError(f"disk_bytes={num_bytes} needs a disk_root to write to")
    if not num_bytes or root is None:
        return None
    return DiskTier(root, layout, num_bytes, dtype, links)
