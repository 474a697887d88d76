"""Pages as objects of a key-value store, under a byte budget.

Knows objects and bytes. Does not know sessions or devices. All reads and writes run on
the worker threads of the root; results come back as futures.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future

import jax
import numpy as np

from cachedattn_jax.store import page as page_format
from cachedattn_jax.store.disk_read import DiskPart, DiskRead
from cachedattn_jax.store.layout import Layout
from cachedattn_jax.store.link import Copy, Link, Links
from cachedattn_jax.store.objects.guard import StorageFailure
from cachedattn_jax.store.objects.object_names import QUARANTINE, list_pages, page_name
from cachedattn_jax.store.objects.root import Root
from cachedattn_jax.store.page import PageKey
from cachedattn_jax.store.page_index import PageEntry, tenant_of
from cachedattn_jax.store.page_reader import PageReader, Wanted

_DELETE_AGAIN_S = 1.0
# Enough to look into, and no way to fill the disk.
_MAX_QUARANTINED = 64


class DiskTier:
    """Immutable page objects under `pages/`, written whole and verified when read."""

    def __init__(
        self,
        root: Root,
        layout: Layout,
        capacity_bytes: int,
        dtype: np.dtype,
        links: Links,
    ) -> None:
        self.root = root
        self._links = links
        self.layout = layout
        self.capacity_bytes = capacity_bytes
        self.object_bytes = page_format.object_bytes(layout)
        self.num_objects = 0
        self.num_quarantined = 0
        self._dtype = dtype
        # By name: an object that comes back must not lose the race with its deletion.
        self._leaving: dict[str, Future[None]] = {}
        self._not_deleted: set[str] = set()
        self._delete_again_s = 0.0

    @property
    def used_bytes(self) -> int:
        return self.num_objects * self.object_bytes

    @property
    def max_objects(self) -> int:
        return self.capacity_bytes // self.object_bytes

    @property
    def can_be_read(self) -> bool:
        """Whether reading is worth a try: it has not failed again and again."""
        return not self.root.kv.reading.is_open

    @property
    def can_be_written(self) -> bool:
        return not self.root.kv.writing.is_open

    @property
    def leaving(self) -> Sequence["Future[None]"]:
        """Deletions under way."""
        return tuple(self._leaving.values())

    def list(self) -> list[tuple[str, PageKey]]:
        """(tenant, key) of every object, without reading any."""
        found = list_pages(self.root)
        self.num_objects = len(found)
        return found

    def write(self, entry: PageEntry, groups: Sequence[jax.Array], row: int) -> Copy:
        """Stores one row of a slab; charges the budget at once."""
        assert entry.token_ids is not None
        self.num_objects += 1
        name = object_name(entry)
        self._not_deleted.discard(name)
        before = self._leaving.pop(name, None)
        done = self.root.submit(
            self._write, name, entry.key, entry.token_ids, list(groups), row, before
        )
        return self._links.host_to_disk.carry(self.object_bytes, done)

    def forget(self, entry: PageEntry) -> None:
        """Takes back the charge of a write that failed, and what it may have left."""
        self.num_objects -= 1
        self._remove(object_name(entry))

    def delete(self, entry: PageEntry) -> "Future[None]":
        """Removes an object; its bytes count as free at once."""
        self.num_objects -= 1
        return self._remove(object_name(entry))

    def quarantine(self, entry: PageEntry, reason: str) -> None:
        """Moves a bad object where nobody reads it; its bytes count as free at once."""
        if reason == "missing":
            self.num_objects -= 1
            return
        if self.num_quarantined >= _MAX_QUARANTINED:
            self.delete(entry)
            return
        self.num_objects -= 1
        self.num_quarantined += 1
        name = object_name(entry)
        self._leaving[name] = self.root.submit(self._quarantine, name, entry, reason)

    def poll(self) -> None:
        """Tries again to delete what could not be deleted, now and then."""
        now = time.monotonic()
        if self._not_deleted and self.can_be_written and now > self._delete_again_s:
            self._delete_again_s = now + _DELETE_AGAIN_S
            for name in list(self._not_deleted):
                self._not_deleted.discard(name)
                self._remove(name)

    def read(self, entries: Sequence[PageEntry]) -> DiskRead:
        """Starts to read and verify pages, from the first layer group to the last."""
        pages = [Wanted(object_name(e), e.key, e.token_ids) for e in entries]
        reader = PageReader(self.root.kv, self.layout, self._dtype, pages)
        copies = []
        for number, part in enumerate(reader.parts):
            num_groups = len(reader.groups(number))
            num_bytes = len(pages) * num_groups * self.layout.group_bytes
            copies.append(_carry(self._links.disk_to_host, num_bytes, part))
        self.root.submit(reader.run)
        return DiskRead(
            num_rows=len(pages),
            groups_per_part=reader.groups_per_part,
            parts=reader.parts,
            copies=copies,
        )

    def _remove(self, name: str) -> "Future[None]":
        self._leaving = {n: d for n, d in self._leaving.items() if not d.done()}
        self._leaving[name] = self.root.submit(self._delete, name)
        return self._leaving[name]

    def _write(
        self,
        name: str,
        key: PageKey,
        token_ids: np.ndarray,
        groups: Sequence[jax.Array],
        row: int,
        before: "Future[None] | None",
    ) -> float:
        if before is not None:
            before.exception()
        # No copy: pages are megabytes, and every pass over them shows in the rate.
        rows = [np.asarray(group)[row].reshape(-1) for group in groups]
        layers = [row.view(np.uint8).data for row in rows]
        header = page_format.encode_header(self.layout, key, token_ids, layers)
        self.root.kv.write(name, [header, *layers]).result()
        return time.monotonic()

    def _delete(self, name: str) -> None:
        try:
            self.root.kv.write(name, None).result()
        except StorageFailure:
            self._not_deleted.add(name)

    def _quarantine(self, name: str, entry: PageEntry, reason: str) -> None:
        tenant = tenant_of(entry.session)
        try:
            self.root.rename(name, f"{QUARANTINE}{tenant}/{entry.key.hex()}.{reason}")
        except StorageFailure:
            self._delete(name)


def object_name(entry: PageEntry) -> str:
    """Where a page lies in the root."""
    return page_name(tenant_of(entry.session), entry.key)


def _carry(link: Link, num_bytes: int, part: "Future[DiskPart]") -> Copy:
    """The copy of a part, which ends when its read does, well or not."""
    ended: Future[float] = Future()

    def note(part: "Future[DiskPart]") -> None:
        error = part.exception()
        ended.set_result(time.monotonic() if error else part.result().end_s)

    part.add_done_callback(note)
    return link.carry(num_bytes, ended)
