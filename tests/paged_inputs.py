"""Random paged attention problems and their answer without pages.

The answer is independent of the code under test: contiguous keys and values, absolute
positions, NumPy in float64; one test holds it against `jax.nn.dot_product_attention`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.page_copy import append_tokens, to_storage
from pallas_kernels.rope import RopeTables, rope_tables

THETA = 10000.0


def ints(*values: int) -> jax.Array:
    return jnp.asarray(values, jnp.int32)


def inverse_frequencies(head_dim: int) -> np.ndarray:
    return THETA ** (-np.arange(0, head_dim, 2) / head_dim)


def rotate_absolute(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """[tokens, heads, head_dim] rotated to absolute positions, in float64."""
    angles = positions[:, None] * inverse_frequencies(x.shape[-1])
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = np.split(x.astype(np.float64), 2, axis=-1)
    return np.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )


def dense_attention(
    query, key, value, first: int, *, window: int | None = None, soft_cap=None
) -> np.ndarray:
    """Causal attention of query rows at positions first, first+1, ... over all keys."""
    num_new, num_tokens = query.shape[0], key.shape[0]
    query = rotate_absolute(query, first + np.arange(num_new))
    key = rotate_absolute(key, np.arange(num_tokens))
    group_size = query.shape[1] // key.shape[1]
    key, value = (np.repeat(x, group_size, axis=1) for x in (key, value))
    score = np.einsum("thd,shd->hts", query, key) / np.sqrt(query.shape[-1])
    if soft_cap is not None:
        score = soft_cap * np.tanh(score / soft_cap)
    distance = first + np.arange(num_new)[:, None] - np.arange(num_tokens)
    visible = (distance >= 0) & (distance < (window or num_tokens))
    weight = np.exp(np.where(visible, score, -np.inf))
    weight /= weight.sum(-1, keepdims=True)
    return np.einsum("hts,shd->thd", weight, value)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Sequences of given lengths in the pages of one pool; all else in it is NaN.

    Attributes:
        query, key, value: per sequence, [length, heads, head_dim], as stored precision.
    """

    query: list[np.ndarray]
    key: list[np.ndarray]
    value: list[np.ndarray]
    pool: jax.Array
    page_tables: jax.Array
    lengths: jax.Array
    rope: RopeTables
    dtype: jnp.dtype


def make_problem(
    lengths,
    *,
    page_tokens: int,
    seed: int = 0,
    head_dim: int = 32,
    kv_heads: int = 2,
    group_size: int = 2,
    dtype="float32",
    storage=None,
    layer: int = 1,
    num_layers: int = 2,
    width: int | None = None,
    num_slots: int | None = None,
) -> Problem:
    rng = np.random.default_rng(seed)
    dtype = jnp.dtype(dtype)
    pages = [-(-max(length, 1) // page_tokens) for length in lengths]
    width = width or max(pages) + 2
    num_slots = num_slots or sum(pages) + 5
    shuffled = rng.permutation(num_slots)
    tables = np.full((len(lengths), width), num_slots - 1, np.int32)
    for row, count in enumerate(pages):
        tables[row, :count], shuffled = shuffled[:count], shuffled[count:]
    rope = rope_tables(
        inverse_frequencies(head_dim), page_tokens=page_tokens, num_pages=width
    )

    def draw(length, heads):
        x = rng.normal(size=(length, heads, head_dim)) * rng.uniform(0.5, 2)
        return np.asarray(jnp.asarray(x, dtype), np.float64)

    query = [draw(length, kv_heads * group_size) for length in lengths]
    key = [draw(length, kv_heads) for length in lengths]
    value = [draw(length, kv_heads) for length in lengths]
    shape = (num_slots, num_layers, kv_heads, 2, page_tokens, head_dim)
    pool = to_storage(jnp.full(shape, jnp.nan, dtype), jnp.dtype(storage or dtype))
    padded = max(40, *lengths)

    def batch(rows):
        out = np.full((len(rows), padded, *rows[0].shape[1:]), np.nan)
        for index, row in enumerate(rows):
            out[index, : len(row)] = row
        return jnp.asarray(out, dtype)

    pool = jax.jit(append_tokens, static_argnames="layer")(
        pool,
        batch(key),
        batch(value),
        jnp.asarray(tables),
        ints(*[0] * len(lengths)),
        ints(*lengths),
        rope,
        layer=layer,
    )
    return Problem(
        query=query,
        key=key,
        value=value,
        pool=pool,
        page_tables=jnp.asarray(tables),
        lengths=ints(*lengths),
        rope=rope,
        dtype=dtype,
    )


def row_errors(got, expected) -> np.ndarray:
    """Largest error of each row, relative to that row's largest value."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    got = got.reshape(-1, got.shape[-1])
    expected = expected.reshape(-1, expected.shape[-1])
    return np.abs(got - expected).max(-1) / np.abs(expected).max(-1)


def last_queries(problem: Problem) -> jax.Array:
    """[batch, heads, head_dim], the query of each sequence's last token."""
    shape = problem.query[0].shape[1:]
    rows = [q[-1] if len(q) else np.full(shape, 7.0) for q in problem.query]
    return jnp.asarray(np.stack(rows), problem.dtype)


def new_queries(problem: Problem, starts, *, padding: int = 3) -> jax.Array:
    """[batch, new_tokens, heads, head_dim], the queries from each start on and padding,
    `padding` tokens of it in the longest row.
    """
    new = [q[start:] for q, start in zip(problem.query, starts, strict=True)]
    query = np.full((len(new), max(map(len, new)) + padding, *new[0].shape[1:]), 7.0)
    for row, tokens in enumerate(new):
        query[row, : len(tokens)] = tokens
    return jnp.asarray(query, problem.dtype)


def decode_error(output, problem: Problem, **mask) -> float:
    """The largest `row_errors` of a decode; padding rows must be zeros."""
    worst = 0.0
    for row, length in enumerate(problem.lengths.tolist()):
        if length == 0:
            np.testing.assert_array_equal(np.asarray(output[row], np.float64), 0)
            continue
        expected = dense_attention(
            problem.query[row][-1:],
            problem.key[row],
            problem.value[row],
            length - 1,
            **mask,
        )
        worst = max(worst, row_errors(output[row], expected[0]).max())
    return worst


def prefill_error(output, problem: Problem, starts, **mask) -> float:
    """The largest `row_errors` of a prefill; padding must be finite."""
    assert np.isfinite(np.asarray(output, np.float64)).all()
    worst = 0.0
    for row, start in enumerate(starts):
        num_new = len(problem.query[row]) - start
        if num_new:
            expected = dense_attention(
                problem.query[row][start:],
                problem.key[row],
                problem.value[row],
                start,
                **mask,
            )
            worst = max(worst, row_errors(output[row, :num_new], expected).max())
    return worst
