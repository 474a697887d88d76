"""The Mosaic GPU kernels, interpreted, equal dense attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

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

TOLERANCE = 3e-2
make_problem = functools.partial(make_problem, dtype="bfloat16")

if "InterpretGPUParams" not in dir(plgpu):
    reason = "this jax has no public interpreter of Mosaic GPU kernels"
    pytest.skip(reason, allow_module_level=True)


def decode(problem, **options):
    run = functools.partial(
        decode_attention, layer=1, backend="mosaic_gpu", interpret=True, **options
    )
    return jax.jit(run)(
        last_queries(problem),
        problem.pool,
        problem.page_tables,
        problem.lengths,
        problem.rope,
    )


def prefill(problem, starts, **options):
    run = functools.partial(
        prefill_attention, layer=1, backend="mosaic_gpu", interpret=True, **options
    )
    return jax.jit(run)(
        new_queries(problem, starts),
        problem.pool,
        problem.page_tables,
        ints(*starts),
        problem.lengths,
        problem.rope,
    )


@pytest.mark.parametrize(
    ("page_tokens", "head_dim", "group_size", "splits"),
    [(64, 128, 4, 1), (128, 64, 1, 2), (64, 64, 16, 3), (256, 64, 2, 1)],
)
def test_decode_matches_dense_attention(page_tokens, head_dim, group_size, splits):
    p = page_tokens
    problem = make_problem(
        [0, 1, p - 1, p, p + 1, 4 * p + 3],
        page_tokens=p,
        head_dim=head_dim,
        group_size=group_size,
        kv_heads=1,
    )
    output = decode(problem, blocks=Blocks(splits=splits))
    assert decode_error(output, problem) < TOLERANCE


@pytest.mark.parametrize(
    ("page_tokens", "head_dim", "group_size", "turns_keys", "splits"),
    [
        (64, 128, 4, True, 1),
        (128, 64, 5, True, 2),
        (64, 128, 4, False, 2),
        (128, 64, 1, False, 1),
        (32, 128, 4, True, 1),
        (16, 128, 1, None, 2),
    ],
)
def test_prefill_matches_dense_attention(
    page_tokens, head_dim, group_size, turns_keys, splits
):
    p = page_tokens
    starts = [0, p - 1, p + 1, 2 * p, 5]
    num_new = [40, 12, 1, 0, 19]
    problem = make_problem(
        [start + new for start, new in zip(starts, num_new, strict=True)],
        page_tokens=p,
        head_dim=head_dim,
        group_size=group_size,
        kv_heads=1,
    )
    blocks = Blocks(turns_keys=turns_keys, splits=splits)
    output = prefill(problem, starts, blocks=blocks)
    assert prefill_error(output, problem, starts) < TOLERANCE


def test_two_runs_are_bit_equal():
    problem = make_problem([70, 33], page_tokens=64, head_dim=64, kv_heads=1)
    for run in (decode, functools.partial(prefill, starts=[40, 3])):
        once, again = run(problem), run(problem)
        np.testing.assert_array_equal(once.view(jnp.uint16), again.view(jnp.uint16))


def test_what_the_kernel_cannot_do_is_said():
    problem = make_problem([70], page_tokens=64, head_dim=64)
    for option in ({"window": 5}, {"soft_cap": 2.0}):
        with pytest.raises(NotImplementedError, match="mosaic_gpu"):
            decode(problem, **option)
    with pytest.raises(NotImplementedError, match="pages of 16"):
        decode(make_problem([70], page_tokens=16, head_dim=64))
    with pytest.raises(NotImplementedError, match="head_dim=32"):
        decode(make_problem([70], page_tokens=64, head_dim=32))


def test_tables_that_point_nowhere_stay_inside_the_pool():
    """On a GPU a wild read would end the process; lengths under jit are not known."""
    problem = make_problem([20, 90], page_tokens=64, head_dim=64, kv_heads=1)
    run = functools.partial(
        decode_attention, layer=1, backend="mosaic_gpu", interpret=True
    )
    output = jax.jit(run)(
        last_queries(problem),
        problem.pool,
        problem.page_tables.at[1].set(10**6),
        problem.lengths.at[1].set(10**6),
        problem.rope,
    )
    clean = decode(problem)
    np.testing.assert_array_equal(np.asarray(output[0]), np.asarray(clean[0]))
