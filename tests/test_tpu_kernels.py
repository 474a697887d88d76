"""The Pallas kernels for TPU, interpreted, equal dense attention and do not race."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import (
    tpu_decode_attention,
    tpu_page_copy,
    tpu_prefill_attention,
)
from pallas_kernels.backends import Blocks
from tests.paged_inputs import dense_attention, ints, make_problem, row_errors

TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}
CASES = [  # page_tokens, head_dim, group_size, dtype
    (16, 64, 4, "float32"),
    (16, 128, 16, "bfloat16"),
    (64, 128, 1, "float32"),
    (64, 64, 4, "bfloat16"),
]
MASKS = [{"window": 21}, {"window": 40, "soft_cap": 1.5}]


@pytest.fixture(autouse=True)
def interpreter():
    """A fresh one for each test: an exception leaves it unusable."""
    pltpu.reset_tpu_interpret_mode_state()
    yield
    pltpu.reset_tpu_interpret_mode_state()


def without_races(kernel, *args, **options):
    kernel = functools.partial(kernel, interpret=True, **options)
    # The interpreter is large to compile: level 0 takes two thirds of the time.
    kernel = jax.jit(kernel, compiler_options={"xla_backend_optimization_level": 0})
    output = np.asarray(kernel(*args))
    races = interpret_pallas_call.races
    assert races is not None and not races.races_found
    return output


def decode(problem, **options):
    heads, head_dim = problem.query[0].shape[1:]
    last = [q[-1] if len(q) else np.full((heads, head_dim), 7) for q in problem.query]
    return without_races(
        tpu_decode_attention.decode,
        jnp.asarray(np.stack(last), problem.dtype),
        problem.pool,
        problem.page_tables,
        problem.lengths,
        problem.rope,
        layer=1,
        **options,
    )


def check_decode(problem, mask, **options):
    output = decode(problem, **mask, **options)
    for row, length in enumerate(problem.lengths.tolist()):
        if length == 0:
            np.testing.assert_array_equal(output[row], 0)
            continue
        expected = dense_attention(
            problem.query[row][-1:],
            problem.key[row],
            problem.value[row],
            length - 1,
            **mask,
        )
        errors = row_errors(output[row], expected[0])
        assert errors.max() < TOLERANCE[problem.dtype.name]
    return output


def prefill(problem, starts, *, padding=3, **options):
    """NaN queries for padding, `padding` tokens of it in the longest row."""
    new = [q[start:] for q, start in zip(problem.query, starts, strict=True)]
    longest = max(map(len, new)) + padding
    query = np.full((len(new), longest, *new[0].shape[1:]), np.nan)
    for row, tokens in enumerate(new):
        query[row, : len(tokens)] = tokens
    output = without_races(
        tpu_prefill_attention.prefill,
        jnp.asarray(query, problem.dtype),
        problem.pool,
        problem.page_tables,
        ints(*starts),
        problem.lengths,
        problem.rope,
        layer=1,
        **options,
    )
    assert np.isfinite(output.astype(np.float32)).all()
    return output


def check_prefill(problem, starts, mask, **options):
    output = prefill(problem, starts, **mask, **options)
    for row, start in enumerate(starts):
        num_new = len(problem.query[row]) - start
        if num_new == 0:
            continue
        expected = dense_attention(
            problem.query[row][start:],
            problem.key[row],
            problem.value[row],
            start,
            **mask,
        )
        errors = row_errors(output[row, :num_new], expected)
        assert errors.max() < TOLERANCE[problem.dtype.name]
    return output


@pytest.mark.parametrize(("page_tokens", "head_dim", "group_size", "dtype"), CASES)
def test_decode_matches_dense_attention(page_tokens, head_dim, group_size, dtype):
    p = page_tokens
    problem = make_problem(
        [0, 1, p - 1, 0, p, p + 1, 2 * p + 5, 0],
        page_tokens=p,
        head_dim=head_dim,
        group_size=group_size,
        dtype=dtype,
    )
    check_decode(problem, {}, blocks=Blocks(context_tokens=2 * p))


@pytest.mark.parametrize("mask", MASKS)
def test_decode_with_window_and_soft_cap_matches_dense_attention(mask):
    problem = make_problem([5, 48, 65, 0, 90], page_tokens=16, head_dim=64)
    check_decode(problem, mask, blocks=Blocks(context_tokens=32))


def test_a_page_before_the_window_is_not_read():
    """Its values are NaN, which even a weight of 0 would spread."""
    problem = make_problem([64], page_tokens=16, head_dim=64, kv_heads=1)
    before = problem.page_tables[0, :2]
    poisoned = replace(problem, pool=problem.pool.at[before].set(jnp.nan))
    check_decode(poisoned, {"window": 20})
    check_prefill(poisoned, [60], {"window": 20})


def test_block_sizes_of_decode_change_rounding_only():
    """Of 10 pages too: a block of more than the pages copied per turn of the loop."""
    problem = make_problem([150], page_tokens=16, head_dim=64, kv_heads=1)
    outputs = [
        check_decode(problem, {}, blocks=Blocks(context_tokens=tokens))
        for tokens in (16, 48, None)
    ]
    for output in outputs[1:]:
        assert row_errors(output, outputs[0]).max() < TOLERANCE["float32"]


@pytest.mark.parametrize(("page_tokens", "head_dim", "group_size", "dtype"), CASES)
def test_prefill_matches_dense_attention(page_tokens, head_dim, group_size, dtype):
    p = page_tokens
    starts = [0, p - 1, p, p + 1, 2 * p]
    new = [35, 1, 16, 20, 0]
    problem = make_problem(
        [start + count for start, count in zip(starts, new, strict=True)],
        page_tokens=p,
        head_dim=head_dim,
        group_size=group_size,
        kv_heads=1 if group_size == 16 else 2,
        dtype=dtype,
    )
    blocks = Blocks(context_tokens=2 * p, query_rows=16 * group_size)
    check_prefill(problem, starts, {}, blocks=blocks)


@pytest.mark.parametrize("mask", MASKS)
def test_prefill_with_window_and_soft_cap_matches_dense_attention(mask):
    starts = [0, 30, 64]
    problem = make_problem([40, 50, 85], page_tokens=16, head_dim=64)
    blocks = Blocks(context_tokens=16, query_rows=32)
    check_prefill(problem, starts, mask, blocks=blocks)


def test_block_sizes_of_prefill_change_rounding_only():
    problem = make_problem([150], page_tokens=16, head_dim=64, kv_heads=1)
    outputs = [
        check_prefill(problem, [115], {}, blocks=blocks)
        for blocks in (
            Blocks(context_tokens=48, query_rows=32),
            Blocks(context_tokens=128, query_rows=96),
            Blocks(),
        )
    ]
    for output in outputs[1:]:
        errors = row_errors(output[0, :35], outputs[0][0, :35])
        assert errors.max() < TOLERANCE["float32"]


def test_two_runs_give_the_same_bits():
    problem = make_problem([40], page_tokens=16, head_dim=64, dtype="bfloat16")
    blocks = Blocks(context_tokens=32, query_rows=16)
    for run in (
        functools.partial(decode, problem, blocks=blocks),
        functools.partial(prefill, problem, [30], blocks=blocks),
    ):
        np.testing.assert_array_equal(run(), run())


def test_a_batch_of_padding_gives_zeros():
    problem = make_problem([0, 0], page_tokens=16, head_dim=64, kv_heads=1)
    blocks = Blocks(context_tokens=16, query_rows=16)
    np.testing.assert_array_equal(decode(problem, blocks=blocks), 0)
    np.testing.assert_array_equal(prefill(problem, [0, 0], blocks=blocks), 0)


@pytest.mark.parametrize(
    ("named", "shape"),
    [
        ("uint16", {"dtype": "bfloat16", "storage": "uint16"}),
        ("float16", {"dtype": "float16"}),
        ("page_tokens=8", {"page_tokens": 8}),
        ("head_dim=96", {"head_dim": 96}),
        ("40000 pages a sequence", {"width": 40000}),
    ],
)
def test_what_the_kernels_cannot_do_is_said(named, shape):
    problem = make_problem([3], **({"page_tokens": 16, "head_dim": 64} | shape))
    for run in (decode, functools.partial(prefill, starts=[0])):
        with pytest.raises(NotImplementedError, match=named):
            run(problem)


def test_a_block_too_large_for_vmem_is_refused():
    problem = make_problem([3], page_tokens=256, head_dim=128, width=20)
    wide = replace(problem, pool=jnp.zeros((1, 2, 16, 2, 256, 128)))
    query = jnp.zeros((1, 16, 128))
    with pytest.raises(NotImplementedError, match="blocks of 5120 tokens"):
        tpu_decode_attention.decode(
            query,
            wide.pool,
            wide.page_tables,
            wide.lengths,
            wide.rope,
            layer=0,
            blocks=Blocks(context_tokens=1 << 20),
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_extracted_pages_are_those_of_the_pool(dtype):
    pool = jax.random.normal(jax.random.key(0), (9, 3, 2, 2, 16, 64)).astype(dtype)
    slots = ints(3, 0, 8, 3, 20, -1)
    pages = without_races(tpu_page_copy.extract_pages, pool, slots)
    expected = np.asarray(pool)[[3, 0, 8, 3, 8, 0]]
    np.testing.assert_array_equal(pages, expected)
    one = without_races(tpu_page_copy.extract_pages, pool, slots, layer=2)
    np.testing.assert_array_equal(one[:, 0], expected[:, 2])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_token_is_written_into_its_page_and_nowhere_else(dtype):
    key, new = jax.random.split(jax.random.key(0))
    pool = jax.random.normal(key, (9, 2, 2, 2, 64, 128)).astype(dtype)
    tokens = jax.random.normal(new, (6, 2, 2, 128)).astype(dtype)
    slots, offsets = [4, 0, 9, 8, 7, -1], [0, 63, 5, 16, 15, 3]  # 9 and -1: padding
    written = without_races(
        tpu_page_copy.append_token, pool, tokens, ints(*slots), ints(*offsets), layer=1
    )
    expected = np.asarray(pool).copy()
    for row, (slot, offset) in enumerate(zip(slots, offsets, strict=True)):
        if 0 <= slot < 9:
            expected[slot, 1, :, :, offset] = np.asarray(tokens[row])
    np.testing.assert_array_equal(written, expected)
