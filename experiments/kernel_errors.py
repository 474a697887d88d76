"""Errors of attention on the device at hand, against float64.

Knows random pages and attention written out in NumPy. Does not know speed.
"""

import functools
from collections.abc import Sequence
from itertools import product
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from cachedattn_jax.model.config import LlamaConfig
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.prefill_attention import FRESH_TOKENS, prefill_attention
from pallas_kernels.rope import RopeTables, rope_tables, rotate, rotate_to


def random_pages(
    config: LlamaConfig, page_tokens: int, batch: int, context: int, seed: int
) -> tuple[jax.Array, jax.Array, RopeTables]:
    """A pool of random pages, shuffled tables over it, and the rotations."""
    width = -(-context // page_tokens)
    slots = batch * width
    shape = (slots, 1, config.num_kv_heads, 2, page_tokens, config.head_dim)
    pool = jax.random.normal(jax.random.key(seed + 1), shape, jnp.bfloat16)
    tables = np.random.default_rng(seed).permutation(slots).reshape(batch, width)
    rope = rope_tables(
        config.inverse_frequencies(), page_tokens=page_tokens, num_pages=width
    )
    return pool, jnp.asarray(tables, jnp.int32), rope


def random_decode(
    config: LlamaConfig, page_tokens: int, batch: int, context: int, seed: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, RopeTables]:
    """What decode attention takes: query, pool, tables, lengths, rotations."""
    pool, tables, rope = random_pages(config, page_tokens, batch, context, seed)
    shape = (batch, config.num_heads, config.head_dim)
    query = jax.random.normal(jax.random.key(seed), shape, pool.dtype)
    return query, pool, tables, jnp.full(batch, context, jnp.int32), rope


def random_prefill(
    config: LlamaConfig, page_tokens: int, batch: int, history: int, new: int, seed: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, RopeTables]:
    """What prefill attention takes: query, pool, tables, starts, lengths, rotations."""
    context = history + new
    pool, tables, rope = random_pages(config, page_tokens, batch, context, seed)
    shape = (batch, new, config.num_heads, config.head_dim)
    query = jax.random.normal(jax.random.key(seed), shape, pool.dtype)
    starts = jnp.full(batch, history, jnp.int32)
    return query, pool, tables, starts, jnp.full(batch, context, jnp.int32), rope


def decode_errors(
    config: LlamaConfig,
    backends: Sequence[str],
    page_tokens: Sequence[int],
    interpret: bool,
    seed: int,
) -> list[dict]:
    """Decode errors on this device against float64, over those of attention with
    rotated keys in bfloat16.
    """
    return _errors("decode", config, backends, page_tokens, interpret, seed)


def prefill_errors(
    config: LlamaConfig,
    backends: Sequence[str],
    page_tokens: Sequence[int],
    interpret: bool,
    seed: int,
) -> list[dict]:
    """The same of new tokens, behind a history, where the longest run of both ends, and
    without one.

    Args:
        backends: "contiguous" is cuDNN on keys without pages, rotated to their
            positions in bfloat16, as a library without a store would have them.
    """
    return _errors("prefill", config, backends, page_tokens, interpret, seed)


def _errors(operation, config, backends, page_tokens, interpret, seed) -> list[dict]:
    heads = f"{config.num_heads}/{config.num_kv_heads}"
    cases = {"decode": [_decode_error], "prefill": [_prefill_error, _fresh_error]}
    found = []
    for size, backend, measure in product(page_tokens, backends, cases[operation]):
        row = {"operation": operation, "heads": heads, "backend": backend}
        row |= {"page_tokens": size, "is_fresh": measure is _fresh_error}
        try:
            found.append(row | measure(config, size, backend, interpret, seed))
        except NotImplementedError as error:
            found.append(row | {"refused": str(error)})
    return found


def _decode_error(config, page_tokens, backend, interpret, seed) -> dict:
    batch, context = 4, 8 * page_tokens - 3
    query, pool, tables, lengths, rope = random_decode(
        config, page_tokens, batch, context, seed
    )
    last = context % page_tokens  # what lies past the length must not matter
    pool = pool.at[tables[:, -1], :, :, :, last:].set(jnp.nan)
    attend = functools.partial(
        decode_attention, layer=0, backend=backend, interpret=interpret
    )
    output = np.asarray(jax.jit(attend)(query, pool, tables, lengths, rope), np.float64)
    last = np.full(batch, context - 1)
    contexts = _contexts(config, pool, tables)
    return _ratio(*_against_float64(config, query, contexts, output, last))


def _prefill_error(config, page_tokens, backend, interpret, seed) -> dict:
    """Of one new token in eight: float64 takes long."""
    history, new = 4 * page_tokens - 5, 3 * page_tokens + 2
    shape = config, page_tokens, 2, history, new
    return _error_of_new(*shape, 8, backend, interpret, seed)


def _fresh_error(config, page_tokens, backend, interpret, seed) -> dict:
    """Where cuDNN computes: of as many tokens as it takes for that."""
    new = FRESH_TOKENS + 3 if not interpret else 3 * page_tokens + 2
    shape = config, page_tokens, 1, 0, new
    return _error_of_new(*shape, max(8, new // 25), backend, interpret, seed)


def _error_of_new(
    config, page_tokens, batch, history, new, every, backend, interpret, seed
) -> dict:
    context = history + new
    query, pool, tables, starts, lengths, rope = random_prefill(
        config, page_tokens, batch, history, new, seed
    )
    past = context % page_tokens or page_tokens
    pool = pool.at[tables[:, -1], :, :, :, past:].set(jnp.nan)
    attend = functools.partial(
        prefill_attention,
        layer=0,
        has_history=history > 0,
        backend=backend,
        interpret=interpret,
    )
    if backend == "contiguous":
        attend = functools.partial(_without_pages, config, history, interpret)
    output = jax.jit(attend)(query, pool, tables, starts, lengths, rope)
    output = np.asarray(output, np.float64)
    contexts = _contexts(config, pool, tables)
    query, places = np.asarray(query), [*range(0, new - 1, every), new - 1]
    parts = [
        _against_float64(
            config,
            query[:, place],
            contexts,
            output[:, place],
            np.full(batch, history + place),
        )
        for place in places
    ]
    return _ratio(*np.mean(parts, axis=0).tolist())


def _without_pages(
    config, history, interpret, query, pool, tables, starts, lengths, rope
):
    """Attention of a library over keys at their positions. It knows no history, so
    queries of its tokens are made up, and what comes of them is dropped.
    """
    stored = pool[tables, 0].astype(jnp.float32)
    num_pages, (batch, new) = tables.shape[1], query.shape[:2]
    context = history + new
    keys = rotate(
        stored[:, :, :, 0],
        rope.page_cos[:num_pages, None, None],
        rope.page_sin[:num_pages, None, None],
    )
    key, value = (
        jnp.swapaxes(pages, 2, 3)
        .reshape(batch, -1, config.num_kv_heads, config.head_dim)[:, :context]
        .astype(pool.dtype)
        for pages in (keys, stored[:, :, :, 1])
    )
    position = starts[:, None] + jnp.arange(new)
    rotated = rotate_to(query.astype(jnp.float32), position, rope).astype(query.dtype)
    implementation: Literal["cudnn", "xla"] = "xla" if interpret else "cudnn"
    try:
        return jax.nn.dot_product_attention(
            jnp.pad(rotated, ((0, 0), (history, 0), (0, 0), (0, 0))),
            key,
            value,
            is_causal=True,
            implementation=implementation,
        )[:, history:]
    except (RuntimeError, ValueError) as error:
        raise NotImplementedError(f"cuDNN: {error}") from error


def _contexts(config, pool, tables) -> list[tuple[np.ndarray, ...]]:
    """Of each sequence, keys at their positions and values in float64, then both
    rounded to bfloat16; [kv_heads, tokens, head_dim] each.
    """
    page_tokens, found = pool.shape[4], []
    for table in tables:
        pages = np.asarray(pool[table, 0], np.float64)
        kv = np.moveaxis(pages, 0, 2)
        kv = kv.reshape(config.num_kv_heads, 2, -1, config.head_dim)
        places = np.arange(kv.shape[2])
        keys = _rotate(config, kv[:, 0], places - places % page_tokens)
        found.append((keys, kv[:, 1], _rounded(keys), _rounded(kv[:, 1])))
    return found


def _against_float64(config, query, contexts, output, positions) -> tuple[float, float]:
    """Errors of one query a sequence, which sees keys 0..position, and those of
    attention with rotated keys in bfloat16.
    """
    ours, ordinary = [], []
    for row, position in enumerate(positions):
        seen = [x[:, : position + 1] for x in contexts[row]]
        queries = np.asarray(query[row], np.float64)
        queries = _rotate(config, queries[:, None], np.array([position]))[:, 0]
        exact = _softmax_mean(queries, *seen[:2])
        rounded = _softmax_mean(_rounded(queries), *seen[2:])
        scale = np.abs(exact).max(-1)
        ours.append(np.abs(output[row] - exact).max(-1) / scale)
        ordinary.append(np.abs(_rounded(rounded) - exact).max(-1) / scale)
    return float(np.mean(ours)), float(np.mean(ordinary))


def _ratio(error: float, usual: float) -> dict:
    return {"error": error, "ordinary_error": usual, "ratio": error / usual}


def _rotate(config, x, positions):
    angles = positions[:, None] * config.inverse_frequencies()
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )


def _softmax_mean(queries, keys, values):
    """[heads, head_dim] of attention in float64, whose weights are not rounded."""
    groups = queries.reshape(len(keys), -1, queries.shape[-1])
    score = np.einsum("kgd,ktd->kgt", groups, keys) / np.sqrt(queries.shape[-1])
    weight = np.exp(score - score.max(-1, keepdims=True))
    mean = np.einsum("kgt,ktd->kgd", weight, values) / weight.sum(-1, keepdims=True)
    return mean.reshape(queries.shape)


def _rounded(x):
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
