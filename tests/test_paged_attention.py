"""Attention over pages equals attention over contiguous keys at absolute positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.page_copy import append_tokens, extract_pages, install_pages
from pallas_kernels.prefill_attention import prefill_attention
from tests.paged_inputs import (
    dense_attention,
    ints,
    make_problem,
    rotate_absolute,
    row_errors,
)

decode_attention = jax.jit(decode_attention, static_argnames="layer")
prefill_attention = jax.jit(prefill_attention, static_argnames="layer")
append_tokens = jax.jit(append_tokens, static_argnames="layer")

TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}
STORAGE = [("float32", None), ("bfloat16", None), ("bfloat16", "uint16")]


def edge_lengths(page_tokens: int) -> list[int]:
    return [1, page_tokens - 1, page_tokens, page_tokens + 1, 9 * page_tokens]


def test_the_dense_answer_is_that_of_jax():
    problem = make_problem([37], page_tokens=4)
    query, key, value = problem.query[0][30:], problem.key[0], problem.value[0]
    mask = np.arange(37) <= 30 + np.arange(7)[:, None]
    expected = jax.nn.dot_product_attention(
        jnp.asarray(rotate_absolute(query, 30 + np.arange(7)), jnp.float32)[None],
        jnp.asarray(rotate_absolute(key, np.arange(37)), jnp.float32)[None],
        jnp.asarray(value, jnp.float32)[None],
        mask=jnp.asarray(mask)[None, None],
    )
    assert row_errors(dense_attention(query, key, value, 30), expected).max() < 1e-5


@pytest.mark.parametrize("page_tokens", [4, 16, 64])
@pytest.mark.parametrize(("dtype", "storage"), STORAGE)
def test_decode_attention_matches_dense_attention(page_tokens, dtype, storage):
    lengths = edge_lengths(page_tokens)
    problem = make_problem(
        lengths, page_tokens=page_tokens, dtype=dtype, storage=storage
    )
    output = decode_attention(
        jnp.asarray(np.stack([q[-1] for q in problem.query]), problem.dtype),
        problem.pool,
        problem.page_tables,
        problem.lengths,
        problem.rope,
        layer=1,
    )
    for row, length in enumerate(lengths):
        expected = dense_attention(
            problem.query[row][-1:], problem.key[row], problem.value[row], length - 1
        )
        assert row_errors(output[row], expected[0]).max() < TOLERANCE[dtype]


@pytest.mark.parametrize("page_tokens", [4, 16])
@pytest.mark.parametrize(("dtype", "storage"), STORAGE)
@pytest.mark.parametrize("num_new", [1, 5, 16, 33])
def test_prefill_attention_matches_dense_attention(
    page_tokens, dtype, storage, num_new
):
    starts = [0, 1, page_tokens - 1, page_tokens, page_tokens + 1, 7 * page_tokens]
    lengths = [start + num_new for start in starts]
    problem = make_problem(
        lengths, page_tokens=page_tokens, dtype=dtype, storage=storage
    )
    padding = np.full((3, *problem.query[0].shape[1:]), np.nan)
    query = [
        np.concatenate([q[start:], padding])
        for q, start in zip(problem.query, starts, strict=True)
    ]
    output = prefill_attention(
        jnp.asarray(np.stack(query), problem.dtype),
        problem.pool,
        problem.page_tables,
        ints(*starts),
        problem.lengths,
        problem.rope,
        layer=1,
    )
    for row, start in enumerate(starts):
        expected = dense_attention(
            problem.query[row][start:], problem.key[row], problem.value[row], start
        )
        got = output[row, :num_new]
        assert row_errors(got, expected).max() < TOLERANCE[dtype]


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_tokens_appended_in_any_pieces_give_the_same_pages(data):
    page_tokens = data.draw(st.sampled_from([1, 4, 16]))
    total = data.draw(st.integers(1, 40))
    whole = make_problem([total], page_tokens=page_tokens, width=42, num_slots=50)
    pool = jnp.full_like(whole.pool, jnp.nan)
    start = 0
    while start < total:
        num_new = data.draw(st.integers(1, min(8, total - start)))
        pool = append_tokens(
            pool,
            _piece(whole.key[0], start, num_new),
            _piece(whole.value[0], start, num_new),
            whole.page_tables,
            ints(start),
            ints(start + num_new),
            whole.rope,
            layer=1,
        )
        start += num_new
    np.testing.assert_array_equal(np.asarray(pool), np.asarray(whole.pool))


def _piece(tokens, start, num_new):
    padded = np.full((1, 8, *tokens.shape[1:]), np.nan)
    padded[0, :num_new] = tokens[start : start + num_new]
    return jnp.asarray(padded, jnp.float32)


def test_padding_rows_of_a_decode_write_nothing_and_return_zeros():
    problem = make_problem([7, 0], page_tokens=4)
    before = np.asarray(problem.pool)
    zeros = jnp.zeros((2, 1, 2, 32))
    after = append_tokens(
        problem.pool,
        zeros,
        zeros,
        problem.page_tables,
        ints(0, 0),
        ints(0, 0),
        problem.rope,
        layer=1,
    )
    np.testing.assert_array_equal(np.asarray(after), before)
    output = decode_attention(
        jnp.ones((2, 4, 32)),
        problem.pool,
        problem.page_tables,
        problem.lengths,
        problem.rope,
        layer=1,
    )
    assert np.isfinite(np.asarray(output[0])).all()
    np.testing.assert_array_equal(np.asarray(output[1]), 0)


def test_pages_keep_their_bits_through_extract_and_install():
    pool = jax.random.normal(jax.random.key(0), (9, 2, 2, 2, 4, 8))
    run = extract_pages(pool, ints(3, 0, 8))
    np.testing.assert_array_equal(np.asarray(run), np.asarray(pool)[[3, 0, 8]])
    nowhere = 9
    moved = install_pages(pool, run, ints(5, nowhere, 1))
    expected = np.asarray(pool).copy()
    expected[5], expected[1] = expected[3], expected[8]
    np.testing.assert_array_equal(np.asarray(moved), expected)


def test_a_page_means_the_same_wherever_it_stands_in_a_sequence():
    """Dropping whole pages from the front is dropping entries of the page table."""
    problem = make_problem([40], page_tokens=8)
    kept = problem.page_tables[:, 2:]
    output = decode_attention(
        jnp.asarray(problem.query[0][-1:], jnp.float32),
        problem.pool,
        kept,
        ints(24),
        problem.rope,
        layer=1,
    )
    expected = dense_attention(
        problem.query[0][-1:], problem.key[0][16:], problem.value[0][16:], 23
    )
    assert row_errors(output, expected).max() < TOLERANCE["float32"]
