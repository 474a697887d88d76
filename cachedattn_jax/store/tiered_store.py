"""The three tiers as one store: leases, saves, demotes and drops pages.

Knows how the parts of the store work together, and sessions. Does not know requests,
positions or models. All calls come from the engine thread; worker threads only move
bytes.
"""

import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future

import jax
import numpy as np

from cachedattn_jax.store.budget import StoreConfig
from cachedattn_jax.store.catalog import Catalog, SessionRecord
from cachedattn_jax.store.device_pool import DevicePool
from cachedattn_jax.store.evictor import Evictor
from cachedattn_jax.store.exits import Exits
from cachedattn_jax.store.fetcher import Fetcher
from cachedattn_jax.store.finder import Finder
from cachedattn_jax.store.host_tier import HostTier
from cachedattn_jax.store.inventory import Inventory
from cachedattn_jax.store.layout import Layout
from cachedattn_jax.store.lease import Lease
from cachedattn_jax.store.leases import Leases
from cachedattn_jax.store.link import Links
from cachedattn_jax.store.objects.faults import Faults
from cachedattn_jax.store.objects.salts import read_salts
from cachedattn_jax.store.opening import open_disk, open_root
from cachedattn_jax.store.outbound import Outbound
from cachedattn_jax.store.page import PageKey, Tail
from cachedattn_jax.store.page_index import PageIndex
from cachedattn_jax.store.placement.placement import Placement
from cachedattn_jax.store.placement.tier import Tier
from cachedattn_jax.store.saver import Saver
from cachedattn_jax.store.sessions import Sessions
from cachedattn_jax.store.stats import StoreStats, gather
from cachedattn_jax.store.survey import Survey
from cachedattn_jax.store.watcher import Watcher
from cachedattn_jax.timeline import Timeline


class TieredStore:
    """Pages of all sessions in device, host and disk memory under three budgets.

    Attributes:
        faults: what is injected below the device, for tests.
        watchers: of the compute stream and of both directions of copies, by name.
    """

    def __init__(
        self,
        layout: Layout,
        config: StoreConfig,
        device: jax.Device,
        timeline: Timeline | None = None,
    ) -> None:
        self.layout = layout
        self.config = config
        self.timeline = timeline or Timeline()
        self.links = Links(config.host_device_link, config.disk_host_link)
        self.watchers = {
            name: Watcher(name)
            for name in ("compute", "host-to-device", "device-to-host")
        }
        self.pool = DevicePool(layout, config.num_slots(layout), device)
        self.host = HostTier(config.num_host_bytes)
        self.faults = Faults(config.io.faults) if config.io.faults else None
        self.pool.faults = self.faults
        self.salts = read_salts(config.tenant_secret_file)
        self.root = open_root(config, layout, self.salts, self.faults)
        dtype = np.dtype(self.pool.dtype)
        self.disk = open_disk(config, self.root, layout, dtype, self.links)
        self.catalog = Catalog(self.root, self._recall)
        self.placement = Placement(
            config.placement,
            host_bytes=config.num_host_bytes,
            # In pages, as sessions are measured; objects on disk have headers.
            disk_bytes=self.disk.max_objects * layout.page_bytes if self.disk else 0,
        )
        self.index = PageIndex(self.placement, layout.page_bytes)
        self._inventory = Inventory(
            self.root, self.disk, self.index, layout, self.salts
        )
        self.counters: Counter[str] = Counter()
        self._exits = Exits(self.index, self.pool, self.host, self.disk, self.counters)
        self._evictor = Evictor(
            self.index,
            self.pool,
            self.host,
            self.disk,
            self._exits,
            self.timeline,
            self.counters,
            config.io.num_backlog_bytes,
        )
        outbound = Outbound(
            self.index,
            self.pool,
            self._exits,
            self.links,
            self.watchers,
            self.timeline,
            self.counters,
            config.num_write_buffer_bytes,
        )
        self.saver = Saver(
            self.index,
            self.pool,
            self.host,
            self._evictor,
            outbound,
            self.counters,
        )
        self.finder = Finder(self.index, self.disk, layout.page_tokens, self.counters)
        self.leases = Leases(
            self.index,
            self.pool,
            self.disk,
            self._evictor,
            self._exits,
            self.saver,
            self.links,
            self.watchers["host-to-device"],
            self.counters,
        )
        self.sessions = Sessions(
            self.catalog,
            self.placement,
            self.finder,
            self.saver,
            self._evictor,
            self.root,
            self.disk,
        )
        self._inventory.take_in()
        self.survey = self._begin_survey()
        self._fetcher = Fetcher(
            self.index, self.pool, self.host, self.disk, self._evictor, self.counters
        )

    def _recall(self, record: SessionRecord) -> None:
        self._inventory.recall(record)
        self._inventory.presume(record)

    def _begin_survey(self) -> Survey | None:
        if self.root is None or self.disk is None or not self.disk.num_objects:
            return None
        return Survey(
            self.root,
            self.layout,
            self.salts,
            self.catalog,
            self._inventory,
            self.index,
            self._exits,
            self.counters,
        )

    # ---- a turn with a lease: its pages are saved, it ends well ----

    def save_soon(self, lease: Lease, num_turns: int, turn: str) -> int:
        """Lets published pages of a turn leave the device, if the policy says so now.

        Args:
            num_turns: finished turns of the session.
            turn: the name under which events note it.

        Returns:
            How many pages will leave for that.
        """
        if not self.config.saves_meanwhile(num_turns):
            return 0
        return self.saver.ask(filter(None, lease.entries), turn)

    def commit(
        self,
        lease: Lease,
        pages: Iterable[tuple[int, PageKey, np.ndarray]],
        tail: Tail | None,
        record: SessionRecord,
        turn: str = "",
        *,
        at_once: bool = True,
    ) -> "tuple[int, Future[None]]":
        """Ends a turn well: pages findable and saved, then the record, then the old
        tail.

        Args:
            pages: place in the lease, key and tokens of every full page of the context.
            tail: its partly filled last page.
            at_once: whether no token of another turn would wait behind its pages.

        Returns:
            How many pages will leave the device for that, and when the record is
            stored; see `Catalog.commit`.
        """
        self.leases.publish(lease, pages)
        old_tail = self.finder.tails.pop(lease.session, None)
        if tail is not None:
            self.leases.publish_page(lease, tail.index, tail.key, tail.token_ids)
            entry = lease.entries[tail.index]
            if entry is not None:
                self.finder.tails[lease.session] = entry
        entries = [entry for entry in lease.entries if entry is not None]
        for entry in entries:
            self.index.touch(entry, lease.session)
        num_asked = 0
        if self.config.saves_early(record.num_turns - 1):
            num_asked = self.saver.ask(entries, turn)
            self.saver.finish(turn, at_once=at_once)
        if self.config.is_saving_synchronous:
            self.saver.drain()
        stored = self.catalog.commit(record)
        if old_tail is not None and (tail is None or old_tail.key != tail.key):
            self._evictor.retire(old_tail)
        return num_asked, stored

    def poll(self) -> None:
        """Notes finished copies and does in the background what placement wants."""
        self.saver.poll()
        self._fetcher.poll()
        self.catalog.poll()
        if self.survey is not None:
            self.survey.poll()
        self._evictor.settle_writes()
        now = time.monotonic()
        for standing in self.placement.expired(now):
            self._evictor.drop(str(standing.session), "ttl")
        for standing, tier, at_most in self.placement.over_quota(now):
            self._evictor.shrink(str(standing.session), tier, at_most)
        self._evictor.keep_reserve()

    def prefetch(self) -> None:
        """Begins to read pages of the next turns in the queue to host memory."""
        for standing in list(self.placement.to_fetch()):
            if not self._fetcher.fetch(str(standing.session)):
                break

    def settle(self) -> None:
        """Waits until nothing is under way and placement wants no more moved."""
        before = None
        while True:
            self.poll()
            self.saver.departures.send(may_delay=True)
            self.prefetch()
            parts = (self.saver, self._evictor, self._fetcher)
            copies = [copy for part in parts for copy in part.under_way]
            if not copies and before == self.counters:
                return
            before = self.counters.copy()
            for copy in copies:
                copy.wait()

    def has_disk_room(self, num_pages: int) -> bool:
        """Whether the disk budget takes so many more pages as it is."""
        disk = self.disk
        if disk is None:
            return False
        return disk.num_objects + num_pages <= disk.max_objects

    def forget_device(self) -> None:
        """Makes the pool anew after a donating call failed; no lease may be live."""
        for entry in list(self.index.in_tier(Tier.DEVICE)):
            entry.slot = None
            self.index.unplace(entry, Tier.DEVICE)
        self.pool.rebuild()

    def stats(self) -> StoreStats:
        """What is here now, and what has happened since the start."""
        return gather(
            self.pool,
            self.host,
            self.disk,
            self.root,
            self.index,
            self.catalog,
            self.counters,
        )

    def empty(self, tier: Tier) -> None:
        """Moves every page that no turn holds out of a tier, downwards if it fits."""
        if tier is Tier.DEVICE:
            held_not = [e for e in self.index.in_tier(tier) if not e.holds]
            self.saver.save_now(held_not)
        self._evictor.empty(tier)

    def close(self) -> None:
        """Writes what only memory holds to disk, as far as it fits; stops threads."""
        self.saver.save_now(list(self.index.in_tier(Tier.DEVICE)))
        self.saver.drain()
        self._evictor.drain()
        self.catalog.close()
        if self.root:
            self.root.close()
        for watcher in self.watchers.values():
            watcher.close()
