"""Whose page every object is, found out in the background after a start.

Knows records and the keys that follow from them. Does not know when pages are used.
"""

from collections import Counter, deque
from concurrent.futures import Future
from dataclasses import replace

from cachedattn_jax.store.catalog import Catalog, SessionRecord, session_key
from cachedattn_jax.store.exits import Exits
from cachedattn_jax.store.inventory import Inventory
from cachedattn_jax.store.layout import Layout
from cachedattn_jax.store.objects.guard import StorageFailure
from cachedattn_jax.store.objects.root import Root
from cachedattn_jax.store.objects.salts import Salts
from cachedattn_jax.store.page import PageKey
from cachedattn_jax.store.page_index import PageIndex, is_unclaimed
from cachedattn_jax.store.placement.tier import Tier
from cachedattn_jax.store.record_pages import read_records, record_pages

# Sessions whose pages are assigned in one step of the engine: some 0.1 ms.
_SESSIONS_AT_ONCE = 16


class Survey:
    """Gives pages found at the start to their sessions; what is left over is deleted.

    Without it a page is nobody's until a turn uses it, and the first to go.
    """

    def __init__(
        self,
        root: Root,
        layout: Layout,
        salts: Salts,
        catalog: Catalog,
        inventory: Inventory,
        index: PageIndex,
        exits: Exits,
        counters: Counter[str],
    ) -> None:
        self._root = root
        self._layout = layout
        self._salts = salts
        self._catalog = catalog
        self._inventory = inventory
        self._sessions = catalog.sessions()
        self._index = index
        self._exits = exits
        self._counters = counters
        self._found: deque[tuple[SessionRecord, list[PageKey]]] = deque()
        self._read: Future[bool] | None = root.submit_chore(self._read_all)

    def poll(self) -> None:
        """Takes in some of what was found out; deletes orphans at the end."""
        if self._read is None:
            return
        for _ in range(min(_SESSIONS_AT_ONCE, len(self._found))):
            self._claim(*self._found.popleft())
        if self._read.done() and not self._found:
            is_complete = self._read.exception() is None and self._read.result()
            self._read = None
            if is_complete and not self._root.is_shared:
                self._collect()

    def finish(self) -> None:
        """Waits for the end; for tests and tools."""
        while self._read is not None:
            if not self._found:
                self._read.exception()
            self.poll()

    def _read_all(self) -> bool:
        """Whether every record could be read."""
        try:
            for _, record in read_records(self._root, self._sessions):
                if record is not None:
                    keys = record_pages(self._layout, self._salts, record)
                    # Its tokens have told all they can, and there may be millions.
                    brief = replace(record, token_ids=record.token_ids[:0].copy())
                    self._found.append((brief, keys))
        except StorageFailure:
            self._root.kv.count("surveys_given_up")
            return False
        return True

    def _claim(self, record: SessionRecord, keys: list[PageKey]) -> None:
        session = session_key(record.tenant, record.session_id)
        self._index.placement.known(session, record.tenant)
        # One that is in memory was taken in already, and may have changed since.
        if self._catalog.known(record.tenant, record.session_id) is None:
            self._inventory.recall(record)
        for key in keys:
            entry = self._index.find(key)
            if entry is not None and is_unclaimed(entry.session):
                self._index.touch(entry, session)

    def _collect(self) -> None:
        owners = filter(is_unclaimed, map(str, self._index.placement.standings))
        for owner in list(owners):
            for entry in list(self._index.last_pages_first(owner, Tier.DISK)):
                if not entry.holds and entry.tiers == [Tier.DISK]:
                    self._exits.leave_disk(entry)
                    self._counters["orphans_collected"] += 1
