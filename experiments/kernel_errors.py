"""Errors of attention on the device at hand, against float64.

Knows random pages and attention written out in NumPy. Does not know speed.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cachedattn_jax.model.config import LlamaConfig
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.rope import RopeTables, rope_tables


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
    """The same of new tokens behind a history, where the longest run of both ends."""
    return _errors("prefill", config, backends, page_tokens, interpret, seed)


def _errors(operation, config, backends, page_tokens, interpret, seed) -> list[dict]:
    measure = {"decode": _decode_error, "prefill": _prefill_error}[operation]
    heads = f"{config.num_heads}/{config.num_kv_heads}"
    found = []
    for size in page_tokens:
        for backend in backends:
            row = {"operation": operation, "heads": heads, "backend": backend}
            row["page_tokens"] = size
            try:
                found.append(row | measure(config, size, backend, interpret, seed))
            except NotImplementedError as error:
                found.append(row | {"refused": str(error)})
    return found


def _decode_error(config, page_tokens, backend, interpret, seed) -> dict:
    batch, context = 4, 8 * page_tokens - 3
    pool, tables, rope = random_pages(config, page_tokens, batch, context, seed)
    shape = (batch, config.num_heads, config.head_dim)
    query = jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
    last = context % page_tokens  # what lies past the length must not matter
    pool = pool.at[tables[:, -1], :, :, :, last:].set(jnp.nan)
    lengths = jnp.full(batch, context, jnp.int32)
    attend = functools.partial(
        decode_attention, layer=0, backend=backend, interpret=interpret
    )
    output = np.asarray(jax.jit(attend)(query, pool, tables, lengths, rope), np.float64)
    last = np.full(batch, context - 1)
    return _against_float64(config, query, pool, tables, output, last)


def _prefill_error(config, page_tokens, backend, interpret, seed) -> dict:
    """Of one new token in eight: float64 takes long."""
    batch, history, new = 2, 4 * page_tokens - 5, 3 * page_tokens + 2
    context = history + new
    pool, tables, rope = random_pages(config, page_tokens, batch, context, seed)
    shape = (batch, new, config.num_heads, config.head_dim)
    query = jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
    pool = pool.at[tables[:, -1], :, :, :, context % page_tokens :].set(jnp.nan)
    starts = jnp.full(batch, history, jnp.int32)
    lengths = jnp.full(batch, context, jnp.int32)
    attend = functools.partial(
        prefill_attention, layer=0, backend=backend, interpret=interpret
    )
    output = jax.jit(attend)(query, pool, tables, starts, lengths, rope)
    output = np.asarray(output, np.float64)
    places = [*range(0, new - 1, 8), new - 1]
    parts = [
        _against_float64(
            config,
            query[:, place],
            pool,
            tables,
            output[:, place],
            np.full(batch, history + place),
        )
        for place in places
    ]
    error, usual = (
        float(np.mean([part[name] for part in parts]))
        for name in ("error", "ordinary_error")
    )
    return {"error": error, "ordinary_error": usual, "ratio": error / usual}


def _against_float64(config, query, pool, tables, output, positions) -> dict:
    """Errors of one query a sequence, which sees keys 0..position."""
    ours, ordinary = [], []
    page_tokens = pool.shape[4]
    for row, position in enumerate(positions):
        pages = np.asarray(pool[tables[row], 0], np.float64)
        kv = np.moveaxis(pages, 0, 2)
        kv = kv.reshape(config.num_kv_heads, 2, -1, config.head_dim)
        kv = kv[:, :, : position + 1]
        places = np.arange(position + 1)
        keys = _rotate(config, kv[:, 0], places - places % page_tokens)
        queries = np.asarray(query[row], np.float64)
        queries = _rotate(config, queries[:, None], np.array([position]))[:, 0]
        exact = _softmax_mean(queries, keys, kv[:, 1])
        rounded = _softmax_mean(*map(_rounded, (queries, keys, kv[:, 1])))
        scale = np.abs(exact).max(-1)
        ours.append(np.abs(output[row] - exact).max(-1) / scale)
        ordinary.append(np.abs(_rounded(rounded) - exact).max(-1) / scale)
    error, usual = float(np.mean(ours)), float(np.mean(ordinary))
    return {"error": error, "ordinary_error": usual, "ratio": error / usual}


def _rotate(config, x, positions):
    angles = positions[:, None] * config.inverse_frequencies()
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )


def _softmax_mean(queries, keys, values):
    """[heads, head_dim] of attention in float64; weights are rounded like inputs."""
    groups = queries.reshape(len(keys), -1, queries.shape[-1])
    score = np.einsum("kgd,ktd->kgt", groups, keys) / np.sqrt(queries.shape[-1])
    weight = np.exp(score - score.max(-1, keepdims=True))
    mean = np.einsum("kgt,ktd->kgd", weight, values) / weight.sum(-1, keepdims=True)
    return mean.reshape(queries.shape)


def _rounded(x):
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
