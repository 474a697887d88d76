"""The Triton kernels, interpreted, and the cuDNN path on XLA equal dense attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import cudnn_attention
from pallas_kernels.backends import Blocks
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.prefill_attention import prefill_attention
from tests.paged_inputs import (
    decode_error,
    ints,
    last_queries,
    make_problem,
    new_queries,
    prefill_error,
)

TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}
MASKS = [{}, {"window": 21}, {"soft_cap": 1.5}, {"window": 40, "soft_cap": 3.0}]
SHAPES = [(16, 32, 1), (16, 64, 4), (64, 128, 3), (16, 128, 16)]


def decode(problem, *, backend="triton", **options):
    run = functools.partial(
        decode_attention, layer=1, backend=backend, interpret=True, **options
    )
    return jax.jit(run)(
        last_queries(problem),
        problem.pool,
        problem.page_tables,
        problem.lengths,
        problem.rope,
    )


def prefill(problem, starts, *, backend="triton", padding=3, **options):
    run = functools.partial(
        prefill_attention, layer=1, backend=backend, interpret=True, **options
    )
    return jax.jit(run)(
        new_queries(problem, starts, padding=padding),
        problem.pool,
        problem.page_tables,
        ints(*starts),
        problem.lengths,
        problem.rope,
    )


# Every shape and every mask, not each with each: a kernel takes seconds to interpret.
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("page_tokens", "head_dim", "group_size", "mask"),
    [(*shape, mask) for shape, mask in zip(SHAPES, MASKS, strict=True)],
)
def test_decode_matches_dense_attention(page_tokens, head_dim, group_size, dtype, mask):
    p = page_tokens
    problem = make_problem(
        [0, 1, p - 1, p, p + 1, 5 * p + 3],
        page_tokens=p,
        head_dim=head_dim,
        group_size=group_size,
        dtype=dtype,
    )
    assert decode_error(decode(problem, **mask), problem, **mask) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("page_tokens", "head_dim", "group_size", "mask", "turns_keys"),
    [
        (*shape, mask, turns_keys)
        for shape, mask in zip(SHAPES, MASKS, strict=True)
        for turns_keys in (False, True)
    ],
)
def test_prefill_matches_dense_attention(
    page_tokens, head_dim, group_size, turns_keys, dtype, mask
):
    p = page_tokens
    starts = [0, 1, p - 1, p, p + 1, 2 * p, 5]
    num_new = [19, 7, 19, 12, 1, 0, 19]
    problem = make_problem(
        [start + new for start, new in zip(starts, num_new, strict=True)],
        page_tokens=p,
        head_dim=head_dim,
        group_size=group_size,
        dtype=dtype,
    )
    blocks = Blocks(turns_keys=turns_keys, query_rows=32)
    output = prefill(problem, starts, blocks=blocks, **mask)
    assert prefill_error(output, problem, starts, **mask) < TOLERANCE[dtype]


def test_the_cudnn_path_matches_dense_attention():
    """cuDNN itself needs a GPU; the same call runs on XLA."""
    starts = [0, 0, 0]
    problem = make_problem(
        [9, 33, 20],
        page_tokens=16,
        head_dim=64,
        dtype="bfloat16",
    )
    with jax.numpy_dtype_promotion("standard"):  # jax's own XLA attention wants it
        output = cudnn_attention.prefill(
            new_queries(problem, starts),
            problem.pool,
            problem.page_tables,
            problem.lengths,
            problem.rope,
            layer=1,
            implementation="xla",
        )
    assert prefill_error(output, problem, starts) < TOLERANCE["bfloat16"]


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_any_lengths_and_blocks_give_the_same_answer(data):
    page_tokens = data.draw(st.sampled_from([16, 32]))
    width = data.draw(st.integers(1, 5))
    starts = data.draw(
        st.lists(st.integers(0, width * page_tokens - 1), min_size=1, max_size=3)
    )
    lengths = [
        data.draw(st.integers(s, min(s + 30, width * page_tokens))) for s in starts
    ]
    problem = make_problem(
        lengths,
        page_tokens=page_tokens,
        group_size=data.draw(st.integers(1, 5)),
        width=width,
        seed=data.draw(st.integers(0, 1000)),
    )
    blocks = Blocks(
        query_rows=data.draw(st.sampled_from([16, 32, 64])),
        context_tokens=data.draw(st.sampled_from([16, 32])),
        splits=data.draw(st.integers(1, 4)),
        turns_keys=data.draw(st.booleans()),
    )
    output = prefill(problem, starts, blocks=blocks)
    assert prefill_error(output, problem, starts) < TOLERANCE["float32"]


def test_two_runs_are_bit_equal():
    problem = make_problem([70, 33], page_tokens=16, dtype="bfloat16", head_dim=64)
    for run in (decode, functools.partial(prefill, starts=[40, 3])):
        once, again = run(problem), run(problem)
        np.testing.assert_array_equal(once.view(jnp.uint16), again.view(jnp.uint16))


def test_tables_that_point_nowhere_stay_inside_the_pool():
    """On a GPU a wild read would end the process; lengths under jit are not known."""
    problem = make_problem([20, 30], page_tokens=16)
    run = functools.partial(decode_attention, layer=1, backend="triton", interpret=True)
    wild = problem.page_tables.at[1].set(10**6)
    output = jax.jit(run)(
        last_queries(problem),
        problem.pool,
        wild,
        problem.lengths.at[1].set(10**6),
        problem.rope,
    )
    clean = decode(problem)
    np.testing.assert_array_equal(np.asarray(output[0]), np.asarray(clean[0]))
