"""Pages as objects of a key-value store, under a byte budget.

Knows objects and bytes. Does not know sessions or devices. All reads and writes run on
the worker threads of the root; results come back as futures.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import jax
import numpy as np

from cachedattn_jax.store import page as page_format
from cachedattn_jax.store.layout import Layout
from cachedattn_jax.store.page import BadPage, PageKey
from cachedattn_jax.store.root import Root

_PREFIX = "pages/"


@dataclass(frozen=True, kw_only=True)
class DiskRead:
    """Pages that were read together.

    Attributes:
        groups: per layer group, [pages, layers_per_group, kv_heads, 2, page_tokens,
            dim].
        bad: reason by index of each page that is missing or may not be used.
    """

    groups: list[np.ndarray]
    bad: dict[int, str]


class DiskTier:
    """Immutable page objects under `pages/`, written whole and verified when read."""

    def __init__(
        self, root: Root, layout: Layout, capacity_bytes: int, dtype: np.dtype
    ) -> None:
        self.root = root
        self.layout = layout
        self.capacity_bytes = capacity_bytes
        self.object_bytes = page_format.object_bytes(layout)
        self.num_objects = 0
        self._dtype = dtype
        self._deletes: dict[PageKey, Future[None]] = {}

    @property
    def used_bytes(self) -> int:
        return self.num_objects * self.object_bytes

    def has_room(self) -> bool:
        return self.used_bytes + self.object_bytes <= self.capacity_bytes

    def list(self) -> list[PageKey]:
        """Keys of every object, without reading any."""
        names = self.root.list(_PREFIX)
        found = [bytes.fromhex(name.replace("/", "")) for name in names]
        self.num_objects = len(found)
        return found

    def write(
        self,
        key: PageKey,
        token_ids: np.ndarray,
        groups: Sequence[jax.Array],
        row: int,
    ) -> "Future[None]":
        """Stores one row of a slab; charges the budget at once."""
        self.num_objects += 1
        # A page that left and comes back must not lose the race with its own deletion.
        before = self._deletes.pop(key, None)
        return self.root.submit(self._write, key, token_ids, list(groups), row, before)

    def forget(self) -> None:
        """Takes back the charge of a write that failed."""
        self.num_objects -= 1

    def delete(self, key: PageKey) -> "Future[None]":
        """Removes an object; its bytes count as free at once."""
        self.num_objects -= 1
        self._deletes = {
            k: done for k, done in self._deletes.items() if not done.done()
        }
        self._deletes[key] = self.root.submit(self._delete, key)
        return self._deletes[key]

    def read(self, keys: Sequence[PageKey]) -> "Future[DiskRead]":
        """Reads and verifies pages, all layers of each."""
        return self.root.submit(self._read, list(keys))

    def _write(
        self,
        key: PageKey,
        token_ids: np.ndarray,
        groups: Sequence[jax.Array],
        row: int,
        before: "Future[None] | None",
    ) -> None:
        if before is not None:
            before.exception()
        payload = b"".join(np.asarray(group)[row].tobytes() for group in groups)
        data = page_format.encode_page(self.layout, key, token_ids, payload)
        self.root.kv.write(_name(key), data).result()

    def _delete(self, key: PageKey) -> None:
        self.root.kv.write(_name(key), None).result()

    def _read(self, keys: Sequence[PageKey]) -> DiskRead:
        layout = self.layout
        reads = [self.root.kv.read(_name(key)) for key in keys]
        groups = [
            np.zeros((len(keys), *layout.group_shape), self._dtype)
            for _ in range(layout.num_groups)
        ]
        bad = {}
        for index, (key, read) in enumerate(zip(keys, reads, strict=True)):
            try:
                payload = self._verified(key, read.result())
            except BadPage as error:
                bad[index] = str(error)
                continue
            except (ValueError, OSError):
                bad[index] = "read_error"
                continue
            for group, array in enumerate(groups):
                start = group * layout.group_bytes
                part = payload[start : start + layout.group_bytes]
                array[index] = np.frombuffer(part, self._dtype).reshape(array.shape[1:])
        return DiskRead(groups=groups, bad=bad)

    def _verified(self, key: PageKey, found) -> memoryview:
        if found.state != "value":
            raise BadPage("missing")
        header = page_format.decode_header(self.layout, key, found.value)
        payload = memoryview(found.value)[page_format.payload_offset(self.layout) :]
        if len(payload) != self.layout.page_bytes:
            raise BadPage("torn")
        page_format.verify_layers(self.layout, header, 0, payload)
        return payload


def _name(key: PageKey) -> str:
    # Two levels of folders keep a local folder below some thousand entries.
    name = key.hex()
    return f"{_PREFIX}{name[:2]}/{name[2:]}"
