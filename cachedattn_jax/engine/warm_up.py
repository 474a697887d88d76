"""Runs every program once, writing nowhere, so that no turn waits for a compiler."""

import functools
from collections.abc import Callable

import jax
import numpy as np

from cachedattn_jax.engine.decode import Decode, Row
from cachedattn_jax.engine.prefill import Prefill, has_history
from cachedattn_jax.engine.request import SamplingParams
from cachedattn_jax.engine.sampling import sampling_batch
from cachedattn_jax.store.device_pool import RUN_PAGES, TOGETHER, DevicePool

# Greedy and sampled tokens come from different programs.
_SAMPLINGS = (SamplingParams(), SamplingParams(temperature=1.0))


def warm_up(
    prefill: Prefill,
    decode: Decode,
    pool: DevicePool,
    pinned_bytes: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Compiles all prefill, decode and page-copy programs.

    Args:
        pinned_bytes: of host memory to be taken, where that is not the device's own.
        progress: called before each with its name, how many are done, and of how many.
    """
    work: list[tuple[str, Callable[[], object]]] = []
    for size in prefill.chunk_tokens:
        name = f"prefill of {size} tokens"
        # Without and with a history, where these are different programs.
        for start in (0,) if has_history(size, 0) else (0, 1):
            compile_program = functools.partial(
                _prefill, prefill, decode, pool, size, start
            )
            work.append((name, compile_program))
    for size in decode.batch_sizes:
        work.append(
            (f"decode of {size} turns", lambda size=size: _decode(decode, size))
        )
    for size in RUN_PAGES:
        work.append((f"copy of {size} pages", lambda size=size: _copy(pool, size)))
    if pool.platform != "cpu":
        work.append(("pinned memory", lambda: pool.take_host_memory(pinned_bytes)))
    for done, (name, compile_program) in enumerate(work):
        if progress is not None:
            progress(name, done, len(work))
        compile_program()
    jax.block_until_ready(pool.arrays)
    if progress is not None:
        progress("compiled", len(work), len(work))


def _prefill(
    prefill: Prefill, decode: Decode, pool: DevicePool, size: int, start: int
) -> None:
    nowhere = np.full(decode.pages_per_sequence, pool.num_slots, np.int32)
    run = prefill.begin(np.zeros(size, np.int32), start, nowhere)
    run.advance()
    for params in _SAMPLINGS:
        decode.last_tokens, _ = prefill.first_token(
            run, decode.last_tokens, decode.num_seats, sampling_batch([params], 1)
        )


def _decode(decode: Decode, size: int) -> None:
    table = np.zeros(decode.pages_per_sequence, np.int32)
    for params in _SAMPLINGS:
        row = Row(seat=decode.num_seats, page_table=table, length=0, sampling=params)
        decode.run([row], size)


def _copy(pool: DevicePool, size: int) -> None:
    nowhere = np.full(size, pool.num_slots, np.int32)
    slots = nowhere.tolist()
    # To host memory, and as where a link is emulated.
    for to_host in {False, pool.is_on_host}:
        pool.extract(slots, to_host=to_host)
        for group in range(len(pool.arrays)):
            pool.extract_group(group, slots, to_host=to_host)
    on_host = pool.put_on_host(pool.extract(slots))
    for num_runs in (1, TOGETHER):
        bundles = pool.bundle([nowhere] * num_runs)
        for group, pages in enumerate(on_host):
            runs, there = pool.put_with_slots([pages] * num_runs, bundles)
            pool.install(group, runs, there)
