"""Arguments that a kernel cannot take are refused at trace time, by name and value; the
rounding of bfloat16 pages costs no more than that of ordinary keys.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.backends import Blocks, Kernels
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.page_copy import append_tokens
from pallas_kernels.prefill_attention import prefill_attention
from tests.paged_inputs import (
    dense_attention,
    ints,
    last_queries,
    make_problem,
    rotate_absolute,
    row_errors,
)

FRESH = {"has_history": False}


def call(change, *, prefill=False, **options):
    """One attention call with a few arguments replaced; shapes only are computed."""
    problem = make_problem([20, 30], page_tokens=16, head_dim=64)
    arguments = {
        "query": last_queries(problem),
        "pool": problem.pool,
        "page_tables": problem.page_tables,
        "lengths": problem.lengths,
        "rope": problem.rope,
        "layer": 1,
    } | change
    if prefill:
        arguments["query"] = arguments["query"][:, None]
        arguments = {"starts": ints(19, 29)} | arguments
        return prefill_attention(**arguments, **options)
    return decode_attention(**arguments, **options)


def wrong_arguments():
    ok = make_problem([20, 30], page_tokens=16, head_dim=64)
    other = make_problem([20], page_tokens=32, head_dim=128)
    query = last_queries(ok)
    return {
        "pool has shape (9, 2, 2, 16, 64), not 6 axes": {"pool": ok.pool[:, :, :, 0]},
        "axis 3 must be 2": {"pool": ok.pool[:, :, :, :1]},
        "query has head_dim 32, the pool has 64": {"query": query[..., :32]},
        "query has 3 heads, no multiple of 2": {"query": query[:, :3]},
        "rope is for pages of 32 tokens, the pool has pages of 16": {
            "rope": other.rope
        },
        "layer=2 is not in 0..1": {"layer": 2},
        "layer=-1 is not in 0..1": {"layer": -1},
        "batches of 2, 1 and 2": {"page_tables": ok.page_tables[:1]},
        "batches of 2, 2 and 1": {"lengths": ok.lengths[:1]},
        "page_tables has 8 pages a sequence, rope reaches 4": {
            "page_tables": jnp.tile(ok.page_tables, (1, 2))
        },
        "lengths holds 65, page_tables reaches 64 tokens": {"lengths": ints(20, 65)},
        "page_tables holds slot 9, the pool has slots 0..8": {
            "page_tables": ok.page_tables.at[0, 1].set(9)
        },
        "page_tables holds slot -1": {"page_tables": ok.page_tables.at[1, 0].set(-1)},
        "window=0 must be at least 1": {"window": 0},
        "soft_cap=0.0 must be above 0": {"soft_cap": 0.0},
        "backend 'cuda' is not one of auto, xla": {"backend": "cuda"},
    }


@pytest.mark.parametrize("prefill", [False, True])
@pytest.mark.parametrize("message", list(wrong_arguments()))
def test_arguments_that_do_not_fit_are_refused_with_name_and_value(message, prefill):
    with pytest.raises(ValueError) as error:
        call(wrong_arguments()[message], prefill=prefill)
    assert message in str(error.value)
    call({}, prefill=prefill)  # and without the change they are taken


def test_starts_of_another_batch_are_refused():
    with pytest.raises(ValueError, match="starts is for a batch of 1, lengths of 2"):
        call({"starts": ints(19)}, prefill=True)


@pytest.mark.parametrize(
    ("backend", "prefill", "change", "options", "what"),
    [
        ("triton", False, {"head_dim": 48}, {}, "head_dim=48"),
        ("triton", True, {"page_tokens": 8}, {}, "page_tokens=8"),
        ("triton", False, {"storage": "uint16", "dtype": "bfloat16"}, {}, "uint16"),
        ("cudnn", False, {}, {}, "decode_attention"),
        ("cudnn", True, {}, {}, "history"),
        ("cudnn", True, {}, FRESH, "float32"),
        ("cudnn", True, {"dtype": "bfloat16"}, FRESH | {"window": 9}, "window"),
        ("cudnn", True, {"dtype": "bfloat16", "head_dim": 256}, FRESH, "head_dim=256"),
        ("mosaic_tpu", False, {"head_dim": 48}, {}, "head_dim"),
        ("mosaic_tpu", True, {"head_dim": 48}, {}, "head_dim"),
    ],
)
def test_what_a_kernel_cannot_do_is_said_at_trace_time(
    backend, prefill, change, options, what
):
    shape = {"page_tokens": 16, "head_dim": 64} | change
    problem = make_problem([20, 30], **shape)
    arguments = [problem.pool, problem.page_tables, problem.lengths, problem.rope]
    query, function = last_queries(problem), decode_attention
    if prefill:
        query, function = query[:, None], prefill_attention
        arguments.insert(2, ints(19, 29))
    run = functools.partial(function, layer=1, backend=backend, **options)
    with pytest.raises(NotImplementedError) as error:
        jax.eval_shape(run, query, *arguments)
    assert what in str(error.value) and backend in str(error.value)


def test_sizes_and_names_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="splits=0"):
        Blocks(splits=0)
    with pytest.raises(
        ValueError, match="decode kernel 'xlaa' is not one of auto, xla"
    ):
        Kernels(decode="xlaa")


@pytest.mark.parametrize("backend", ["xla", "triton", "mosaic_tpu"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bfloat16_decode_rounds_no_worse_than_absolute_positions(backend, seed):
    """Against float64, over 8 contexts; ordinary attention rounds its rotated queries,
    rotated keys and weights to bfloat16 and accumulates in float32.
    """
    problem = make_problem(
        [37, 64, 65, 128, 129, 190, 200, 256],
        page_tokens=64,
        head_dim=128,
        kv_heads=1,
        group_size=4,
        dtype="bfloat16",
        seed=seed,
    )
    output = decode_attention(
        last_queries(problem),
        problem.pool,
        problem.page_tables,
        problem.lengths,
        problem.rope,
        layer=1,
        backend=backend,
        interpret=backend != "xla",
    )
    ours, ordinary = [], []
    for row, length in enumerate(problem.lengths.tolist()):
        tokens = problem.query[row][-1:], problem.key[row], problem.value[row]
        expected = dense_attention(*tokens, length - 1)[0]
        ours.append(row_errors(output[row], expected))
        ordinary.append(row_errors(_ordinary_decode(*tokens), expected))
    assert np.mean(ours) <= 1.1 * np.mean(ordinary)


def _ordinary_decode(query, key, value):
    """Absolute positions, in bfloat16 with float32 accumulation."""
    length = len(key)
    query = rotate_absolute(query, np.array([length - 1]))[0]
    key = rotate_absolute(key, np.arange(length))[:, 0]
    query, key, value = (
        jnp.asarray(x, jnp.bfloat16) for x in (query, key, value[:, 0])
    )
    score = jnp.matmul(query, key.T, preferred_element_type=jnp.float32)
    weight = jnp.exp(score / np.sqrt(query.shape[-1]).astype(np.float32))
    total = weight.sum(-1, keepdims=True)
    weight = weight.astype(jnp.bfloat16)
    mean = jnp.matmul(weight, value, preferred_element_type=jnp.float32) / total
    return mean.astype(jnp.bfloat16)


def test_a_token_written_by_itself_is_the_token_written_with_its_page():
    """CUDA writes the one new token of a decode, other backends its whole page."""
    problem = make_problem([20, 33, 0], page_tokens=16, head_dim=64)
    key, value = jax.random.normal(jax.random.key(0), (2, 3, 1, 2, 64))
    lengths = ints(21, 34, 0)  # the last row is padding
    pools = [
        append_tokens(
            problem.pool,
            key,
            value,
            problem.page_tables,
            jnp.maximum(lengths - 1, 0),
            lengths,
            problem.rope,
            layer=1,
            backend=backend,
        )
        for backend in ("xla", "triton")
    ]
    page, token = map(np.asarray, pools)
    np.testing.assert_array_equal(page, token)
    assert (np.asarray(pools[0]) != np.asarray(problem.pool)).any()
