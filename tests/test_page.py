"""Pages name themselves, and damage to them is seen."""

import dataclasses

import crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachedattn_jax.store.chain import Chain
from cachedattn_jax.store.layout import Layout
from cachedattn_jax.store.page import (
    BadPage,
    decode_header,
    encode_page,
    group_range,
    joined_checksum,
    object_bytes,
    page_key,
    payload_offset,
    verify_layers,
)

LAYOUT = Layout(
    num_layers=4,
    layers_per_group=2,
    num_kv_heads=2,
    head_dim=8,
    page_tokens=4,
    dtype="float32",
    rope="theta=10000",
    weights="w",
)
TOKENS = np.arange(4, dtype=np.int32)
KEY = page_key(LAYOUT.digest, b"tenant", b"", "append", TOKENS)


def make_object(seed: int = 0) -> tuple[bytes, bytes]:
    payload = np.random.default_rng(seed).bytes(LAYOUT.page_bytes)
    return encode_page(LAYOUT, KEY, TOKENS, payload), payload


def read(data: bytes) -> bytes:
    header = decode_header(LAYOUT, KEY, data)
    payload = memoryview(data)[payload_offset(LAYOUT) :]
    verify_layers(LAYOUT, header, range(LAYOUT.num_layers), [payload])
    if len(payload) != LAYOUT.page_bytes:
        raise BadPage("torn")
    return bytes(payload)


def test_an_object_gives_back_what_was_written():
    data, payload = make_object()
    assert len(data) == object_bytes(LAYOUT)
    header = decode_header(LAYOUT, KEY, data)
    np.testing.assert_array_equal(header.token_ids, TOKENS)
    assert read(data) == payload


@pytest.mark.parametrize("group", [0, 1])
def test_a_layer_group_is_a_byte_range_that_can_be_verified_alone(group):
    data, payload = make_object()
    header = decode_header(LAYOUT, KEY, data[: payload_offset(LAYOUT)])
    part = memoryview(data[group_range(LAYOUT, group)])
    start = group * LAYOUT.group_bytes
    assert bytes(part) == payload[start : start + LAYOUT.group_bytes]
    layers, others = [range(2), range(2, 4)][:: 1 - 2 * group]
    verify_layers(LAYOUT, header, layers, [part])
    verify_layers(LAYOUT, header, layers, [part[:7], part[7:]])
    with pytest.raises(BadPage, match="checksum"):
        verify_layers(LAYOUT, header, others, [part])
    with pytest.raises(BadPage, match="checksum"):
        verify_layers(LAYOUT, header, layers, [part[7:], part[:7]])
    with pytest.raises(BadPage, match="torn"):
        verify_layers(LAYOUT, header, range(4), [part])


@given(st.data())
def test_any_flipped_bit_that_matters_is_detected(data):
    stored, _ = make_object()
    bit = data.draw(st.integers(0, 8 * len(stored) - 1))
    damaged = bytearray(stored)
    damaged[bit // 8] ^= 1 << bit % 8
    padding = range(
        payload_offset(LAYOUT)
        - 64
        + len(stored[: payload_offset(LAYOUT)].rstrip(b"\0")),
        payload_offset(LAYOUT),
    )
    try:
        read(bytes(damaged))
    except BadPage:
        return
    # Only padding between header and layers may change unseen: nobody reads it.
    header_end = payload_offset(LAYOUT)
    assert header_end - 64 < bit // 8 < header_end, padding


@given(st.integers(0, object_bytes(LAYOUT) - 1))
def test_a_torn_object_is_detected_at_any_length(length):
    stored, _ = make_object()
    with pytest.raises(BadPage):
        read(stored[:length])


@pytest.mark.parametrize(
    "change",
    [
        {"page_tokens": 8},
        {"dtype": "bfloat16"},
        {"num_kv_heads": 4},
        {"head_dim": 16},
        {"num_layers": 8},
        {"rope": "theta=500000"},
        {"weights": "others"},
    ],
)
def test_a_page_of_another_layout_is_refused(change):
    stored, _ = make_object()
    other = dataclasses.replace(LAYOUT, **change)
    assert other.digest != LAYOUT.digest
    with pytest.raises(BadPage):
        decode_header(other, KEY, stored)


def test_the_group_size_is_no_part_of_the_layout():
    for layers_per_group in (1, 4):
        other = dataclasses.replace(LAYOUT, layers_per_group=layers_per_group)
        assert other.digest == LAYOUT.digest


def test_a_page_under_the_wrong_key_is_refused():
    stored, _ = make_object()
    other = page_key(LAYOUT.digest, b"tenant", b"", "append", TOKENS + 1)
    with pytest.raises(BadPage, match="other_key"):
        decode_header(LAYOUT, other, stored)


def test_keys_differ_by_everything_that_changes_what_a_page_holds():
    tokens = np.arange(3, dtype=np.int32)
    keys = {
        page_key(LAYOUT.digest, b"a", b"", "append", TOKENS),
        page_key(LAYOUT.digest, b"b", b"", "append", TOKENS),
        page_key(LAYOUT.digest, b"a", KEY, "append", TOKENS),
        page_key(LAYOUT.digest, b"a", b"", "truncated(1)", TOKENS),
        page_key(LAYOUT.digest, b"a", b"", "append", tokens),
        page_key(LAYOUT.digest, b"", b"a", "append", TOKENS),
        page_key(b"other", b"a", b"", "append", TOKENS),
    }
    assert len(keys) == 7


@given(st.lists(st.integers(0, 99), min_size=1, max_size=30), st.integers(0, 30))
def test_sessions_share_the_keys_of_their_common_beginning_only(tokens, branch):
    tokens = np.asarray(tokens, np.int32)
    branch = min(branch, len(tokens) - 1)
    other = tokens.copy()
    other[branch] += 1
    empty = Chain(layout=LAYOUT, salt=b"")
    ours = empty.after(tokens, (), len(tokens)).keys
    theirs = empty.after(other, (), len(tokens)).keys
    assert len(ours) == len(tokens) // 4
    shared = branch // 4
    assert ours[:shared] == theirs[:shared]
    assert not set(ours[shared:]) & set(theirs[shared:])
    part = empty.after(tokens, (), branch)
    assert part.after(tokens, (), len(tokens)).keys == ours
    if len(tokens) >= 4:
        assert page_key(LAYOUT.digest, b"", b"", "append", tokens[:4]) == ours[0]


@given(st.lists(st.binary(min_size=12, max_size=12), min_size=1, max_size=40))
def test_the_checksum_of_pieces_follows_from_theirs(pieces):
    checksums = np.array([crc32c.crc32c(piece) for piece in pieces], np.uint32)
    assert joined_checksum(checksums, 12) == crc32c.crc32c(b"".join(pieces))
