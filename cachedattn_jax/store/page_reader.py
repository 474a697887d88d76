"""The reading of a run of pages, layer group by layer group, on a worker thread.

Knows objects, headers and checksums. Does not know tiers, or who waits.

    page 0  | header, part 0 |  part 1  |  part 2  |
    page 1  | header, part 0 |  part 1  |  part 2  |     a part: some layer groups
                  first          then       last

Bytes are read into the arrays that they are wanted in and checked there, while the next
parts of the pages are being read.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from cachedattn_jax.store import page as page_format
from cachedattn_jax.store.disk_read import PASSING, DiskPart
from cachedattn_jax.store.layout import Layout
from cachedattn_jax.store.objects.buffers import Buffer
from cachedattn_jax.store.objects.guard import Guard, Operation, StorageFailure
from cachedattn_jax.store.page import BadPage, PageHeader, PageKey

# Consecutive layer groups of a page are one part until they have so many bytes: waking
# the threads for one takes as long as reading 100 KiB, and pages of 2 MiB in parts of
# 256 KiB take twice the CPU time in all.
_LEAST_PART_BYTES = 1024 * 1024
# Parts of a page that is read alone are so many times larger, for nothing else comes
# meanwhile: one of 2 MiB takes 1.1 ms of CPU time, in two parts 1.3. Still larger parts
# of larger pages gain nothing.
_ALONE = 2


class Wanted(NamedTuple):
    """A page to be read; `token_ids` are those it must hold, if that is known."""

    name: str
    key: PageKey
    token_ids: np.ndarray | None


class PageReader:
    """One run of pages on its way; `run` does the work, once.

    Attributes:
        groups_per_part: layer groups that are read together.
        parts: end one after the other.
    """

    def __init__(
        self,
        kv: Guard,
        layout: Layout,
        dtype: np.dtype,
        pages: Sequence[Wanted],
    ) -> None:
        least = _LEAST_PART_BYTES * (_ALONE if len(pages) == 1 else 1)
        wanted = -(-least // layout.group_bytes)
        self.groups_per_part = min(wanted, layout.num_groups)
        num_parts = -(-layout.num_groups // self.groups_per_part)
        self.parts: list[Future[DiskPart]] = [Future() for _ in range(num_parts)]
        self._kv = kv
        self._layout = layout
        self._dtype = dtype
        self._pages = pages
        self._prefixes = [bytearray(page_format.payload_offset(layout)) for _ in pages]
        self._headers: dict[int, PageHeader] = {}
        self._bad: dict[int, str] = {}

    def groups(self, part: int) -> range:
        """The layer groups of a part."""
        first = part * self.groups_per_part
        return range(first, min(first + self.groups_per_part, self._layout.num_groups))

    def run(self) -> None:
        """Reads all pages; whatever happens, every part ends."""
        try:
            # One array: the large ones get huge pages, which a first touch shows.
            shape = (self._layout.num_groups, len(self._pages))
            data = np.empty((*shape, self._layout.group_bytes), np.uint8)
            reads = [self._begin(page, data) for page in range(len(self._pages))]
            for part, future in enumerate(self.parts):
                for page in range(len(self._pages)):
                    self._take(page, part, reads[page], data)
                future.set_result(self._part(part, data))
        except BaseException as error:
            for future in self.parts:
                if not future.done():
                    future.set_exception(error)

    def _begin(self, page: int, data: np.ndarray) -> Sequence[Operation]:
        """Starts to read a page."""
        parts: list[list[Buffer]] = [
            [*_pieces(data, self.groups(part), page)] for part in range(len(self.parts))
        ]
        parts[0].insert(0, self._prefixes[page])
        return self._kv.read_parts(self._pages[page].name, parts)

    def _take(
        self, page: int, part: int, reads: Sequence[Operation], data: np.ndarray
    ) -> None:
        """Waits for a part of a page and checks it."""
        if page in self._bad:
            return
        groups = self.groups(part)
        num_bytes = len(groups) * self._layout.group_bytes
        try:
            num_read = _result(reads[part])
            if part == 0:
                num_bytes += len(self._prefixes[page])
                self._headers[page] = self._header(page, num_read)
            if num_read < num_bytes:
                raise BadPage("torn")
            self._verify(page, groups, data)
        except BadPage as error:
            self._bad[page] = str(error)
            if self._bad[page] not in PASSING:
                self._kv.count(f"corrupt_{error}")
            for read in reads[part + 1 :]:
                read.cancel()

    def _header(self, page: int, num_read: int) -> PageHeader:
        """The header, checked against what was asked for."""
        wanted = self._pages[page]
        prefix = bytes(self._prefixes[page][:num_read])
        header = page_format.decode_header(self._layout, wanted.key, prefix)
        expected = wanted.token_ids
        if expected is not None and not np.array_equal(header.token_ids, expected):
            raise BadPage("other_tokens")
        return header

    def _verify(self, page: int, groups: range, data: np.ndarray) -> None:
        per_group = self._layout.layers_per_group
        layers = range(groups.start * per_group, groups.stop * per_group)
        pieces = _pieces(data, groups, page)
        page_format.verify_layers(self._layout, self._headers[page], layers, pieces)

    def _part(self, part: int, data: np.ndarray) -> DiskPart:
        shape = (len(self._pages), *self._layout.group_shape)
        return DiskPart(
            groups=[
                data[g].view(self._dtype).reshape(shape) for g in self.groups(part)
            ],
            headers=dict(self._headers),
            bad=dict(self._bad),
            end_s=time.monotonic(),
        )


def _pieces(data: np.ndarray, groups: range, page: int) -> list[memoryview]:
    """Where layer groups of a page lie; one piece if there are no pages between."""
    rows = data[groups.start : groups.stop, page]
    if rows.flags.c_contiguous:
        rows = rows.reshape(1, -1)
    return [row.data for row in rows]


def _result(read: Operation) -> int:
    """How many bytes were read; BadPage if there are none."""
    try:
        num_read = read.result()
    except StorageFailure as failure:
        raise BadPage(failure.reason) from failure
    if num_read is None:
        raise BadPage("missing")
    return num_read
