"""Logits of the model over pages equal those of the dense model within 1e-4."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cachedattn_jax.model.llama import embed, unembed
from cachedattn_jax.model.paged import decode_step, prefill_group
from pallas_kernels.page_copy import extract_pages, install_pages
from pallas_kernels.rope import rope_tables
from tests.engines import (
    LAYERS_PER_GROUP,
    PAGE_TOKENS,
    dense_logits,
    random_tokens,
    tiny_model,
)
from tests.paged_inputs import ints, row_errors

NUM_SLOTS = 60
prefill_group = jax.jit(prefill_group, static_argnums=0)
decode_step = jax.jit(decode_step, static_argnums=0)


class Paged:
    """One sequence in the pages of a pool that is NaN wherever nothing was written."""

    def __init__(self, page_tokens: int, layers_per_group: int, seed: int) -> None:
        self.config, self.params = tiny_model()
        config = self.config
        num_pages = -(-config.window // page_tokens)
        self.rope = rope_tables(
            config.inverse_frequencies(), page_tokens=page_tokens, num_pages=num_pages
        )
        shape = (
            NUM_SLOTS,
            layers_per_group,
            config.num_kv_heads,
            2,
            page_tokens,
            config.head_dim,
        )
        num_groups = config.num_layers // layers_per_group
        self.pools = [jnp.full(shape, jnp.nan) for _ in range(num_groups)]
        self.rng = np.random.default_rng(seed)
        self.slots = self.rng.permutation(NUM_SLOTS)[:num_pages]
        self.groups = [
            self.params.layers[start : start + layers_per_group]
            for start in range(0, config.num_layers, layers_per_group)
        ]

    def prefill(self, token_ids: list[int], start: int, size: int) -> np.ndarray:
        """[tokens, vocab] logits of one padded chunk."""
        padded = np.zeros((1, size), np.int32)
        padded[0, : len(token_ids)] = token_ids
        x = embed(self.config, self.params, jnp.asarray(padded))
        for group, layers in enumerate(self.groups):
            x, self.pools[group] = prefill_group(
                self.config,
                layers,
                x,
                self.pools[group],
                ints(*self.slots)[None],
                ints(start),
                ints(start + len(token_ids)),
                self.rope,
            )
        logits = unembed(self.config, self.params, x)
        return np.asarray(logits)[0, : len(token_ids)]

    def decode(self, token: int, length: int) -> np.ndarray:
        """[vocab] logits; the second row of the batch is padding."""
        tables = jnp.stack([ints(*self.slots), ints(*self.slots)])
        logits, self.pools = decode_step(
            self.config,
            self.params,
            ints(token, 0),
            self.pools,
            tables,
            ints(length, 0),
            self.rope,
        )
        return np.asarray(logits)[0]

    def move(self) -> None:
        """All pages leave the device and come back in other slots."""
        slots = self.rng.permutation(NUM_SLOTS)[: len(self.slots)]
        for group, pool in enumerate(self.pools):
            host = np.asarray(extract_pages(pool, ints(*self.slots)))
            empty = jnp.full_like(pool, jnp.nan)
            self.pools[group] = install_pages(empty, jnp.asarray(host), ints(*slots))
        self.slots = slots


@functools.cache
def conversation() -> tuple[list[int], np.ndarray]:
    window = tiny_model()[0].window
    token_ids = random_tokens(np.random.default_rng(5), window)
    return token_ids, dense_logits(token_ids)


@pytest.mark.parametrize("layers_per_group", LAYERS_PER_GROUP)
@pytest.mark.parametrize("page_tokens", PAGE_TOKENS)
@pytest.mark.parametrize("edge", ["0", "1", "page-1", "page", "page+1", "full"])
def test_logits_over_pages_equal_the_dense_ones(page_tokens, layers_per_group, edge):
    token_ids, expected = conversation()
    window = len(token_ids)
    history = {
        "0": 0,
        "1": 1,
        "page-1": page_tokens - 1,
        "page": page_tokens,
        "page+1": page_tokens + 1,
        "full": window - 6,
    }[edge]
    paged = Paged(page_tokens, layers_per_group, seed=history)
    for start in range(0, history, 32):
        end = min(start + 32, history)
        logits = paged.prefill(token_ids[start:end], start, 32)
        assert row_errors(logits, expected[start:end]).max() < 1e-4
    paged.move()
    end = min(history + 4, window)
    logits = paged.prefill(token_ids[history:end], history, 8)
    assert row_errors(logits, expected[history:end]).max() < 1e-4
    for length in range(end + 1, min(end + 3, window) + 1):
        logits = paged.decode(token_ids[length - 1], length)
        assert row_errors(logits[None], expected[length - 1][None]).max() < 1e-4
