"""Measures the constants of the cost model on the machine and the links there are.

Knows how to time copies and programs. Does not know what is decided from it. Writes
into no slot that holds a page, so it may run at any time when nothing else does.
"""

import os
import time
from collections.abc import Sequence

import jax
import numpy as np

from cachedattn_jax.engine.cost_model import ChunkCost, Constants, Link
from cachedattn_jax.engine.decode import Decode, Row
from cachedattn_jax.engine.prefill import Prefill
from cachedattn_jax.engine.request import SamplingParams
from cachedattn_jax.engine.sampling import sampling_batch
from cachedattn_jax.store.device_pool import RUN_PAGES
from cachedattn_jax.store.link import Copy
from cachedattn_jax.store.page_index import PageEntry
from cachedattn_jax.store.tiered_store import TieredStore
from cachedattn_jax.timeline import busy_s

_REPEATS = 3
_DISK_PAGES = 16
# What copies count as of which none was seen under way: less than one takes.
_LEAST_S = 1e-6


def calibrate(prefill: Prefill, decode: Decode, store: TieredStore) -> Constants:
    """Takes about a second on 2 CPU cores with 28 M parameters."""
    to_device, to_host = _host_links(store)
    disk_read, disk_write = _disk_links(store)
    return Constants(
        host_to_device=to_device,
        device_to_host=to_host,
        disk_read=disk_read,
        disk_write=disk_write,
        prefill={
            size: _chunk_cost(prefill, decode, store, size)
            for size in prefill.chunk_tokens
        },
        decode_step_s=_decode_step_s(decode, store),
    )


def _host_links(store: TieredStore) -> tuple[Link, Link]:
    """Both directions, from runs of one page and of as many as travel together."""
    pool, down, up = store.pool, [], []
    for size in (min(RUN_PAGES), max(RUN_PAGES)):
        nowhere = np.full(size, pool.num_slots).tolist()
        downs, ups = [], []
        for _ in range(_REPEATS):
            pages = jax.block_until_ready(pool.extract_group(0, nowhere))
            on_host = pool.put_on_host([pages])
            done = store.watchers["device-to-host"].watch(on_host)
            downs.append(store.links.device_to_host.carry(pages.nbytes, done))
            downs[-1].wait()
            arrays = pool.put(on_host)
            done = store.watchers["host-to-device"].watch(arrays)
            ups.append(store.links.host_to_device.carry(pages.nbytes, done))
            ups[-1].wait()
        down.append(_quickest(downs))
        up.append(_quickest(ups))
    return _line(up), _line(down)


def _disk_links(store: TieredStore) -> tuple[Link | None, Link | None]:
    """Writes pages of noise, reads them and deletes them; None without a disk tier."""
    disk, layout = store.disk, store.layout
    if disk is None or not store.has_disk_room(_DISK_PAGES):
        return None, None
    noise = np.frombuffer(os.urandom(layout.group_bytes), np.uint8)
    group = noise.view(store.pool.dtype).reshape(1, *layout.group_shape)
    groups = [jax.device_put(group, store.pool.host_sharding)] * layout.num_groups
    tokens = np.zeros(layout.page_tokens, np.int32)
    pages = [
        PageEntry(key=os.urandom(32), session="calibration/", token_ids=tokens)
        for _ in range(_DISK_PAGES)
    ]
    try:
        writes = [disk.write(page, groups, 0) for page in pages]
        written = _flow(writes)
        read = [_flow(disk.read(pages).copies) for _ in range(_REPEATS)]
    finally:
        for page in pages:
            disk.delete(page)
    # One run of pages at a time is what a load asks for; its start is in the rate.
    best = max(read, key=lambda link: link.bytes_per_s)
    return best, written


def _chunk_cost(
    prefill: Prefill, decode: Decode, store: TieredStore, size: int
) -> ChunkCost:
    """Time of a program without context and with as much as the window takes."""
    layout = store.layout
    most = decode.pages_per_sequence * layout.page_tokens - size
    starts = (0, max(0, most // layout.page_tokens * layout.page_tokens))
    times = []
    for start in starts:
        table = _read_only_table(decode, store, start)
        for repeat in range(_REPEATS):
            started = time.monotonic()
            run = prefill.begin(np.zeros(size, np.int32), start, table)
            run.advance()
            decode.last_tokens, sampled = prefill.first_token(
                run, decode.last_tokens, decode.num_seats, sampling_batch([], 1)
            )
            jax.block_until_ready((store.pool.arrays, sampled))
            seconds = time.monotonic() - started
            if repeat == 0:
                times.append(seconds)
            times[-1] = min(times[-1], seconds)
    slope = max(0.0, (times[1] - times[0]) / starts[1]) if starts[1] else 0.0
    # The context at the end of the first program is its own size.
    return ChunkCost(max(0.0, times[0] - slope * size), slope)


def _decode_step_s(decode: Decode, store: TieredStore) -> float:
    """One step of a full batch, each context half the window."""
    length = decode.pages_per_sequence * store.layout.page_tokens // 2
    table = _read_only_table(decode, store, length - 1)
    row = Row(
        # A seat past the last: the sampled token goes nowhere.
        seat=decode.num_seats,
        page_table=table,
        length=length,
        sampling=SamplingParams(),
    )
    times = []
    for _ in range(_REPEATS):
        started = time.monotonic()
        sampled = decode.run([row] * decode.num_seats)
        jax.block_until_ready((store.pool.arrays, sampled))
        times.append(time.monotonic() - started)
    return min(times)


def _read_only_table(decode: Decode, store: TieredStore, start: int) -> np.ndarray:
    """A page table whose context is in the pool and whose new tokens go nowhere."""
    num_slots, first_new = store.pool.num_slots, start // store.layout.page_tokens
    table = np.arange(decode.pages_per_sequence, dtype=np.int32) % num_slots
    table[first_new:] = num_slots
    return table


def _quickest(copies: Sequence[Copy]) -> tuple[int, float]:
    """Bytes and seconds of the quickest of equal copies.

    One that had ended before its link was told of it, as happens on CPU, seems to have
    taken no time; it says nothing.
    """
    seconds = (end_s - start_s for start_s, end_s in (copy.span for copy in copies))
    return copies[0].num_bytes, min((s for s in seconds if s > 0), default=_LEAST_S)


def _flow(copies: Sequence[Copy]) -> Link:
    """The link that carries copies, which may overlap, in the time they took."""
    num_bytes = sum(copy.num_bytes for copy in copies)
    # Of copies that overlap, those that took no time of their own count with the rest.
    return Link(0.0, num_bytes / max(busy_s(copy.span for copy in copies), _LEAST_S))


def _line(points: Sequence[tuple[int, float]]) -> Link:
    """The link whose time is latency + bytes / rate at two points (bytes, seconds)."""
    (few, fast), (many, slow) = points
    if few == many or slow <= fast:
        return Link(0.0, many / slow)
    bytes_per_s = (many - few) / (slow - fast)
    return Link(max(0.0, fast - few / bytes_per_s), bytes_per_s)
