"""The engine's invariants with the accelerators' kernels, interpreted: tokens equal the
dense model's, whatever kernel reads the pages and wherever they were.
"""

import dataclasses
import functools
import tempfile

import numpy as np
import pytest

from cachedattn_jax.store.placement.tier import Tier
from tests.engines import (
    ask,
    assert_nothing_leaked,
    assert_same_reply,
    greedy_reply,
    make_engine,
    random_tokens,
)

PAGE_TOKENS, HEAD_DIM = 16, 64  # what every kernel can do


@functools.cache
def engine_of(kernel: str):
    return make_engine(
        page_tokens=PAGE_TOKENS,
        head_dim=HEAD_DIM,
        kernel=kernel,
        disk_pages=1000,
        disk_root=tempfile.mkdtemp(),
    )


@pytest.mark.parametrize("tier", list(Tier))
@pytest.mark.parametrize("kernel", ["triton", "mosaic_tpu"])
def test_tokens_equal_the_dense_model_with_every_kernel(kernel, tier):
    engine = engine_of(kernel)
    for length in (0, 1, PAGE_TOKENS - 1, PAGE_TOKENS + 1, 3 * PAGE_TOKENS):
        rng = np.random.default_rng([length, list(Tier).index(tier)])
        session = f"{tier}-{length}"
        if length:
            ask(engine, session, random_tokens(rng, length), max_tokens=1)
        if tier is not Tier.DEVICE:
            engine.store.empty(Tier.DEVICE)
        if tier is Tier.DISK:
            engine.store.empty(Tier.HOST)
        turn = ask(engine, session, random_tokens(rng, 3), max_tokens=3)
        assert dataclasses.asdict(turn.tokens_from)[tier.value] == length
        expected = greedy_reply(turn.prompt, 3, head_dim=HEAD_DIM)
        assert_same_reply(turn.reply, *expected)
    assert_nothing_leaked(engine)
