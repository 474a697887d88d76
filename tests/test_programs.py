"""Compiled programs: pools are updated in place, nothing compiles after the warm-up."""

import jax
import jax.extend.core
import jax.monitoring
import numpy as np
import pytest

from cachedattn_jax.engine import decode, prefill
from cachedattn_jax.engine.request import SamplingParams
from cachedattn_jax.engine.sampling import sampling_batch
from cachedattn_jax.store import device_pool
from cachedattn_jax.store.placement.tier import Tier
from tests.engines import ask, make_engine, random_tokens, tiny_model

# Many, so that a copy of a pool would dwarf what attention needs; no memory is taken.
NUM_SLOTS = 32_768


def pool_shapes(engine):
    pool = engine.store.pool
    shape = (NUM_SLOTS, *pool.arrays[0].shape[1:])
    return [jax.ShapeDtypeStruct(shape, pool.dtype) for _ in pool.arrays]


def temporaries(lowered) -> int:
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def engine(request):
    return make_engine(dtype=request.param, max_batch=8, layers_per_group=2)


def one_pool(engine) -> int:
    shape = pool_shapes(engine)[0]
    return int(np.prod(shape.shape)) * shape.dtype.itemsize


def test_prefill_updates_the_pool_in_place(engine):
    config, params = tiny_model(engine.model.dtype)
    pages = engine._decode.pages_per_sequence
    for size in engine.config.chunk_tokens:
        x = jax.ShapeDtypeStruct((1, size, config.hidden_size), config.dtype)
        lowered = prefill._group.lower(
            config,
            params.layers[:2],
            x,
            pool_shapes(engine)[0],
            np.zeros((1, pages), np.int32),
            np.zeros(1, np.int32),
            np.zeros(1, np.int32),
            engine._prefill._rope,
        )
        assert temporaries(lowered) < one_pool(engine) / 4


def test_decode_updates_all_pools_in_place(engine):
    config, params = tiny_model(engine.model.dtype)
    pages = engine._decode.pages_per_sequence
    for size in engine._decode.batch_sizes:
        lowered = decode._step.lower(
            config,
            params,
            pool_shapes(engine),
            engine._decode.last_tokens,
            np.zeros(size, np.int32),
            np.zeros((size, pages), np.int32),
            np.zeros(size, np.int32),
            engine._prefill._rope,
        )
        assert temporaries(lowered) < one_pool(engine) / 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_choosing_tokens_does_not_branch_on_the_device(engine, temperature):
    """On CUDA the host may wait for such a branch, and for all programs before it."""
    sampling = sampling_batch([SamplingParams(temperature=temperature)], 2)
    assert sampling.is_greedy == (temperature == 0)
    logits = jax.ShapeDtypeStruct((2, engine.model.vocab_size), np.float32)
    seats = np.zeros(2, np.int32)
    program = decode._choose.trace(
        engine._decode.last_tokens, logits, seats, sampling, seats
    )
    names = {equation.primitive.name for equation in walk(program.jaxpr.jaxpr)}
    assert not names & {"cond", "while"}
    # Sorting the vocabulary is for those who ask for it.
    assert ("sort" in names) == (temperature > 0)


def walk(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from walk(inner)


def test_install_updates_the_pool_in_place(engine):
    shape = pool_shapes(engine)[0]
    for size in device_pool.RUN_PAGES:
        run = jax.ShapeDtypeStruct((size, *shape.shape[1:]), shape.dtype)
        slots = np.zeros(size, np.int32)
        lowered = device_pool._install.lower(shape, run, slots)
        assert temporaries(lowered) < one_pool(engine) / 4
        together = device_pool.TOGETHER
        lowered = device_pool._install_together.lower(
            shape, [run] * together, np.zeros((together, size), np.int32)
        )
        assert temporaries(lowered) < one_pool(engine) / 4


@pytest.mark.parametrize("loading", ["auto", "always"])
def test_nothing_compiles_after_the_warm_up(tmp_path, loading):
    engine = make_engine(
        max_batch=4, disk_pages=500, disk_root=str(tmp_path), loading=loading
    )
    engine.warm_up()
    traced = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if "jaxpr_trace" in event or "backend_compile" in event:
            traced.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        rng = np.random.default_rng(0)
        for tier in ("device", "host", "disk"):
            for name in "abcde":
                ask(engine, name, random_tokens(rng, 18), max_tokens=4)
            if tier != "device":
                engine.store.empty(Tier.DEVICE)
            if tier == "disk":
                engine.store.empty(Tier.HOST)
        for name in "abcde":
            ask(engine, name, random_tokens(rng, 3), max_tokens=4)
        sampling = SamplingParams(temperature=0.7, top_k=5)
        ask(engine, "a", random_tokens(rng, 3), max_tokens=4, sampling=sampling)
    finally:
        jax.monitoring.clear_event_listeners()
    # What is decided by the clock may be to compute everything.
    assert loading == "auto" or engine.store.counters["pages_read"] > 0
    assert not traced
