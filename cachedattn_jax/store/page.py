"""The page: its key, and its form as one self-describing object of bytes.

Knows hashing, the header and checksums. Does not know tiers, devices or sessions.

    object  | header | token ids | checksums [layers, kv_heads] | crc of all that | pad
    |
            | layer 0: head 0 (K, V), head 1, ... | layer 1 | ...

Layers follow each other, so any layer group of any size is one byte range that can be
verified by itself, and so is a shard of heads inside a layer.
"""

import functools
import hashlib
import struct
from dataclasses import dataclass

import crc32c
import numpy as np

from cachedattn_jax.store.layout import FORMAT_VERSION, Layout
from cachedattn_jax.store.objects.buffers import Buffer, Buffers, num_bytes

PageKey = bytes
# The event of a page that follows the one before it.
APPEND = "append"

_MAGIC = b"KVPAGE"
_FIXED = struct.Struct(
    "<6sHII32s32s"
)  # magic, version, num_tokens, page_tokens, digest, key
_ALIGNMENT = 64


@dataclass(frozen=True, kw_only=True)
class Tail:
    """The partly filled last page of a session.

    Attributes:
        index: full pages before it.
        token_ids: int32, the tokens it holds.
    """

    index: int
    key: PageKey
    token_ids: np.ndarray


class BadPage(Exception):
    """A stored page that may not be used; the message is the reason counters show."""


def page_key(
    layout_digest: bytes,
    salt: bytes,
    parent: PageKey,
    event: str,
    token_ids: np.ndarray,
) -> PageKey:
    """Identity of a page: what it holds and everything it was computed after.

    Args:
        salt: the tenant's; pages of different salts never meet.
        parent: key of the page before, empty for the first.
        event: `APPEND`, or the name of the truncations since the page before, such as
            "truncated(8)".
        token_ids: int32, the tokens of this page alone.
    """
    digest = hashlib.blake2b(digest_size=32)
    for part in (layout_digest, salt, parent, event.encode()):
        digest.update(len(part).to_bytes(4, "little"))
        digest.update(part)
    digest.update(np.ascontiguousarray(token_ids, "<i4").tobytes())
    return digest.digest()


@dataclass(frozen=True, kw_only=True)
class PageHeader:
    """What an object says of itself.

    Attributes:
        token_ids: int32 [num_tokens]; fewer than page_tokens in a partly filled tail.
        checksums: uint32 [layers, kv_heads], crc32c of each head's K and V.
    """

    key: PageKey
    token_ids: np.ndarray
    checksums: np.ndarray


def payload_offset(layout: Layout) -> int:
    """Where layer 0 begins in an object; the header is all that lies before."""
    checksums = layout.num_layers * layout.num_kv_heads
    end = _FIXED.size + 4 * (layout.page_tokens + checksums + 1)
    return -(-end // _ALIGNMENT) * _ALIGNMENT


def object_bytes(layout: Layout) -> int:
    """Size of a whole object."""
    return payload_offset(layout) + layout.page_bytes


def group_range(layout: Layout, group: int) -> slice:
    """Byte range of a layer group in an object."""
    start = payload_offset(layout) + group * layout.group_bytes
    return slice(start, start + layout.group_bytes)


def encode_page(
    layout: Layout, key: PageKey, token_ids: np.ndarray, payload: bytes
) -> bytes:
    """The object of a page whose layers, in order, are `payload`."""
    return encode_header(layout, key, token_ids, [payload]) + payload


def encode_header(
    layout: Layout, key: PageKey, token_ids: np.ndarray, layers: Buffers
) -> bytes:
    """What lies before the layers of a page in its object.

    Args:
        layers: the bytes of all layers, in order; each piece has whole layers.
    """
    assert num_bytes(layers) == layout.page_bytes, (num_bytes(layers), layout)
    ids = np.zeros(layout.page_tokens, "<i4")
    ids[: len(token_ids)] = token_ids
    checksums = [checksum for piece in layers for checksum in _checksums(layout, piece)]
    header = _FIXED.pack(
        _MAGIC, FORMAT_VERSION, len(token_ids), layout.page_tokens, layout.digest, key
    )
    header += ids.tobytes() + np.array(checksums, "<u4").tobytes()
    header += struct.pack("<I", crc32c.crc32c(header))
    return header.ljust(payload_offset(layout), b"\0")


def decode_header(layout: Layout, key: PageKey, data: bytes) -> PageHeader:
    """Reads the header of an object and checks that it is the page asked for.

    Raises:
        BadPage: the object is short, damaged, of another layout or of another key.
    """
    if len(data) < payload_offset(layout):
        raise BadPage("torn")
    if not data.startswith(_MAGIC):
        raise BadPage("not_a_page")
    _, version, num_tokens, page_tokens, digest, found = _FIXED.unpack_from(data)
    if version != FORMAT_VERSION or digest != layout.digest:
        raise BadPage("other_layout")
    if page_tokens != layout.page_tokens or num_tokens > page_tokens:
        raise BadPage("other_layout")
    shape = (layout.num_layers, layout.num_kv_heads)
    end = _FIXED.size + 4 * (page_tokens + shape[0] * shape[1])
    if struct.unpack_from("<I", data, end)[0] != crc32c.crc32c(data[:end]):
        raise BadPage("header_checksum")
    if any(data[end + 4 : payload_offset(layout)]):
        raise BadPage("header_checksum")
    if found != key:
        raise BadPage("other_key")
    ids = np.frombuffer(data, "<i4", num_tokens, _FIXED.size)
    checksums = np.frombuffer(
        data, "<u4", shape[0] * shape[1], _FIXED.size + 4 * page_tokens
    )
    return PageHeader(key=found, token_ids=ids, checksums=checksums.reshape(shape))


def verify_layers(
    layout: Layout, header: PageHeader, layers: range, pieces: Buffers
) -> None:
    """Checks the bytes of whole layers, in order, against the header.

    Raises:
        BadPage: the bytes end early or differ from what was written.
    """
    if num_bytes(pieces) != len(layers) * layout.layer_bytes:
        raise BadPage("torn")
    expected = header.checksums[layers.start : layers.stop].reshape(-1)
    # One pass over all heads: calls for 8 KiB each take longer than their bytes.
    found = 0
    for piece in pieces:
        found = crc32c.crc32c(piece, found)
    if joined_checksum(expected, layout.head_bytes) != found:
        raise BadPage("checksum")


def joined_checksum(checksums: np.ndarray, num_bytes: int) -> int:
    """CRC-32C of pieces of so many bytes one after the other, from those of each."""
    parts = np.ascontiguousarray(checksums, "<u4").view(np.uint8)
    starts, table = _tables(len(checksums), num_bytes)
    return int(np.bitwise_xor.reduce(table.take(starts + parts)))


@functools.cache
def _tables(num_pieces: int, num_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """What a byte in the CRC of each piece is in that of all.

    A CRC is linear: zeros behind a piece move the bits of its CRC, each by itself.

    Returns:
        int64 [4 * pieces], where the values of a byte begin in the table.
        uint32 [4 * pieces * 256], the table.
    """
    zeros = bytes(num_bytes)
    of_zeros = crc32c.crc32c(zeros)
    rows = [[1 << bit for bit in range(32)]]
    for _ in range(num_pieces - 1):
        rows.append([crc32c.crc32c(zeros, moved) ^ of_zeros for moved in rows[-1]])
    bits = np.array(rows[::-1], np.uint32).reshape(num_pieces, 4, 8, 1)
    has_bit = np.arange(256) >> np.arange(8)[:, None] & 1
    table = np.bitwise_xor.reduce(np.where(has_bit, bits, 0), axis=2)
    return 256 * np.arange(4 * num_pieces), table.astype(np.uint32).reshape(-1)


def _checksums(layout: Layout, payload: Buffer) -> list[int]:
    """CRC-32C of each head of whole layers."""
    view, size, checksum = memoryview(payload), layout.head_bytes, crc32c.crc32c
    return [checksum(view[at : at + size]) for at in range(0, len(view), size)]
