"""Pages as objects of a key-value store, under a byte budget.

Knows objects and bytes. Does not know sessions or devices. All reads and writes run on
the worker threads of the root; results come back as futures.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import jax
import numpy as np
import tensorstore as ts

from cachedattn_jax.store import page as page_format
from cachedattn_jax.store.layout import Layout
from cachedattn_jax.store.link import Copy, Link, Links
from cachedattn_jax.store.page import BadPage, PageHeader, PageKey
from cachedattn_jax.store.root import Root

_PREFIX = "pages/"

# A read of fewer bytes than this costs as much as one of so many: consecutive layer
# groups of a page are read together until they have them.
_LEAST_READ_BYTES = 256 * 1024


@dataclass(frozen=True, kw_only=True)
class DiskPart:
    """Some layer groups of pages that were read together.

    Attributes:
        groups: per layer group, [pages, layers_per_group, kv_heads, 2, page_tokens,
            dim]; unset where a page is bad.
        headers: of the pages, by index, without the bad ones.
        bad: reason by index of each page that is missing or may not be used.
        end_s: when the read ended, seconds of the monotonic clock.
    """

    groups: list[np.ndarray]
    headers: dict[int, PageHeader]
    bad: dict[int, str]
    end_s: float


@dataclass(frozen=True, kw_only=True)
class DiskRead:
    """Pages on their way from disk, a few layer groups at a time, in order.

    Attributes:
        num_rows: how many pages.
        groups_per_part: layer groups that are read together.
        copies: of the parts, one after the other.
    """

    num_rows: int
    groups_per_part: int
    parts: "list[Future[DiskPart]]"
    copies: list[Copy]

    def has_group(self, group: int) -> bool:
        """Whether a layer group is in host memory, or cannot come any more."""
        return self.copies[group // self.groups_per_part].has_arrived

    def wait(self, group: int, timeout_s: float | None) -> None:
        """Waits for a layer group, but not longer than this."""
        self.copies[group // self.groups_per_part].wait(timeout_s)

    def group(self, group: int) -> np.ndarray:
        """A layer group that is in host memory."""
        part, place = divmod(group, self.groups_per_part)
        return self.parts[part].result().groups[place]

    def bad(self) -> dict[int, str]:
        """Reason by index of every page found bad until now."""
        found: dict[int, str] = {}
        for part in self.parts:
            if part.done() and part.exception() is not None:
                found = {index: "read_failed" for index in range(self.num_rows)}
            elif part.done():
                found = {**part.result().bad, **found}
        return found


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
        self._dtype = dtype
        self._deletes: dict[PageKey, Future[None]] = {}

    @property
    def used_bytes(self) -> int:
        return self.num_objects * self.object_bytes

    @property
    def max_objects(self) -> int:
        return self.capacity_bytes // self.object_bytes

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
    ) -> Copy:
        """Stores one row of a slab; charges the budget at once."""
        self.num_objects += 1
        # A page that left and comes back must not lose the race with its own deletion.
        before = self._deletes.pop(key, None)
        done = self.root.submit(self._write, key, token_ids, list(groups), row, before)
        return self._links.host_to_disk.carry(self.object_bytes, done)

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

    def read(self, keys: Sequence[PageKey]) -> DiskRead:
        """Starts to read and verify pages, from the first layer group to the last."""
        layout = self.layout
        per_part = min(-(-_LEAST_READ_BYTES // layout.group_bytes), layout.num_groups)
        parts: list[Future[DiskPart]] = []
        copies = []
        for first in range(0, layout.num_groups, per_part):
            groups = range(first, min(first + per_part, layout.num_groups))
            before = parts[0] if parts else None
            parts.append(self.root.submit(self._read, list(keys), groups, before))
            num_bytes = len(keys) * len(groups) * layout.group_bytes
            copies.append(_carry(self._links.disk_to_host, num_bytes, parts[-1]))
        return DiskRead(
            num_rows=len(keys), groups_per_part=per_part, parts=parts, copies=copies
        )

    def _write(
        self,
        key: PageKey,
        token_ids: np.ndarray,
        groups: Sequence[jax.Array],
        row: int,
        before: "Future[None] | None",
    ) -> float:
        if before is not None:
            before.exception()
        payload = b"".join(np.asarray(group)[row].tobytes() for group in groups)
        data = page_format.encode_page(self.layout, key, token_ids, payload)
        self.root.kv.write(_name(key), data).result()
        return time.monotonic()

    def _delete(self, key: PageKey) -> None:
        self.root.kv.write(_name(key), None).result()

    def _read(
        self,
        keys: Sequence[PageKey],
        groups: range,
        first_part: "Future[DiskPart] | None",
    ) -> DiskPart:
        """Reads some layer groups; the first part brings the headers for the others."""
        layout = self.layout
        headers = dict(first_part.result().headers) if first_part else {}
        start = page_format.group_range(layout, groups[0]).start if first_part else 0
        wanted = slice(start, page_format.group_range(layout, groups[-1]).stop)
        bad = dict(first_part.result().bad) if first_part else {}
        reads = {
            index: self.root.kv.read(_name(key), byte_range=wanted)
            for index, key in enumerate(keys)
            if index not in bad
        }
        arrays = [
            np.empty((len(keys), *layout.group_shape), self._dtype) for _ in groups
        ]
        for index, read in reads.items():
            try:
                payload = _found(read)
                if first_part is None:
                    end = page_format.payload_offset(layout)
                    header = bytes(payload[:end])
                    headers[index] = page_format.decode_header(
                        layout, keys[index], header
                    )
                    payload = payload[end:]
                first_layer = groups[0] * layout.layers_per_group
                page_format.verify_layers(layout, headers[index], first_layer, payload)
            except BadPage as error:
                bad[index] = str(error)
                continue
            for place, array in enumerate(arrays):
                part = payload[place * layout.group_bytes :][: layout.group_bytes]
                array[index] = np.frombuffer(part, self._dtype).reshape(array.shape[1:])
        return DiskPart(groups=arrays, headers=headers, bad=bad, end_s=time.monotonic())


def _found(read: ts.Future) -> memoryview:
    """The bytes that were read; BadPage if there are none."""
    try:
        found = read.result()
    except (ValueError, OSError) as error:
        is_short = "OUT_OF_RANGE" in str(error)
        raise BadPage("torn" if is_short else "read_error") from error
    if found.state != "value":
        raise BadPage("missing")
    return memoryview(found.value)


def _carry(link: Link, num_bytes: int, part: "Future[DiskPart]") -> Copy:
    """The copy of a part, which ends when its read does, well or not."""
    ended: Future[float] = Future()

    def note(part: "Future[DiskPart]") -> None:
        error = part.exception()
        ended.set_result(time.monotonic() if error else part.result().end_s)

    part.add_done_callback(note)
    return link.carry(num_bytes, ended)


def _name(key: PageKey) -> str:
    # Two levels of folders keep a local folder below some thousand entries.
    name = key.hex()
    return f"{_PREFIX}{name[:2]}/{name[2:]}"
