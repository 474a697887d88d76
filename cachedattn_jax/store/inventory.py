"""What lies in a root, made known to the index. Knows names; reads no page."""

import time
import urllib.parse

from cachedattn_jax.store.catalog import SessionRecord, session_key
from cachedattn_jax.store.disk_tier import DiskTier
from cachedattn_jax.store.layout import Layout
from cachedattn_jax.store.objects.root import Root
from cachedattn_jax.store.objects.salts import Salts
from cachedattn_jax.store.page import PageKey
from cachedattn_jax.store.page_index import PageIndex, unclaimed
from cachedattn_jax.store.placement.tier import Tier
from cachedattn_jax.store.record_pages import record_pages


class Inventory:
    """Places pages of the disk tier in the index that no turn of this engine wrote."""

    def __init__(
        self,
        root: Root | None,
        disk: DiskTier | None,
        index: PageIndex,
        layout: Layout,
        salts: Salts,
    ) -> None:
        self._root = root
        self._disk = disk
        self._index = index
        self._layout = layout
        self._salts = salts

    def take_in(self) -> None:
        """Makes known what lies on disk: each page is its tenant's, first to go."""
        for tenant, key in self._disk.list() if self._disk else ():
            owner = unclaimed(tenant)
            if owner not in self._index.placement.standings:
                self._index.placement.known(owner, urllib.parse.unquote(tenant))
            self._place(key, owner)
            self._index.placement.closed(owner)

    def recall(self, record: SessionRecord) -> None:
        """A session comes back from the root: its pin and its time to live go on."""
        placement = self._index.placement
        session = session_key(record.tenant, record.session_id)
        idle_s = max(0.0, time.time() - record.used_at)
        placement.known(session, record.tenant)
        placement.recalled(session, time.monotonic() - idle_s)
        placement.pinned(session, record.is_pinned, record.tenant)

    def presume(self, record: SessionRecord) -> None:
        """Takes the pages of a record that another replica may have written as stored.

        Those that are not will be misses when they are read.
        """
        if self._root is None or not self._root.is_shared or self._disk is None:
            return
        session = session_key(record.tenant, record.session_id)
        self._index.placement.known(session, record.tenant)
        for key in record_pages(self._layout, self._salts, record):
            if (
                self._index.find(key) is None
                and self._disk.num_objects < self._disk.max_objects
            ):
                self._disk.num_objects += 1
                self._place(key, session)

    def _place(self, key: PageKey, session: str) -> None:
        entry = self._index.add(key, session, None)
        entry.on_disk = True
        self._index.place(entry, Tier.DISK)
