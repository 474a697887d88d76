"""Counted costs of kernels, the roofline's bounds, the speed experiment tried out."""

from typing import Any

import jax.numpy as jnp
import pytest

from cachedattn_jax.run_directory import RunDirectory
from experiments import kernel_speed
from experiments.roofline import CHIPS, Row
from pallas_kernels.costs import decode_cost, prefill_cost


def shapes(new_tokens):
    query = jnp.zeros((2, new_tokens, 8, 64), jnp.bfloat16)
    pool = jnp.zeros((99, 1, 2, 2, 16, 64), jnp.bfloat16)
    return query, pool, jnp.zeros((2, 8), jnp.int32)  # 128 tokens each


def test_a_decode_reads_each_page_once():
    query, pool, tables = shapes(1)
    query = jnp.zeros((2, 8, 64), jnp.bfloat16)
    cost = decode_cost(query, pool, tables)
    kv = 2 * 128 * 2 * 2 * 64 * 2
    assert cost.bytes_accessed == kv + 2 * (2 * 8 * 64 * 2)
    assert cost.flops == 2 * 8 * 128 * 2 * 64 * 2


@pytest.mark.parametrize("block", [1, 16, 128])
def test_a_prefill_computes_whole_blocks_up_to_its_queries(block):
    query, pool, tables = shapes(32)
    cost = prefill_cost(
        query,
        pool,
        tables,
        query_tokens=block,
        block_tokens=block,
        reads_per_block=False,
    )
    exact = sum(range(97, 129))  # token t of the last 32 sees t + 1
    pairs = {1: exact, 16: 16 * (112 + 128), 128: 128 * 128}[block]
    assert cost.flops == 2 * 8 * pairs * 2 * 64 * 2


def test_the_slower_of_memory_and_products_bounds_a_program():
    h200 = CHIPS[0]
    assert h200.bound_s(h200.bytes_s, 0.0) == (1.0, "memory")
    assert h200.bound_s(h200.bytes_s, 2 * h200.flops_s) == (2.0, "compute")


@pytest.mark.parametrize(
    ("program", "num_bytes", "flops", "missed"),
    [
        ("decode_step", 1.11, 9.0, True),
        ("decode_attention, page 64", 1.09, 9.0, False),
        ("prefill_group", 9.0, 1.06, True),
        ("prefill_group", 9.0, 1.04, False),
    ],
)
def test_rows_that_miss_their_target_say_so(program, num_bytes, flops, missed):
    row = Row(
        model="m",
        program=program,
        min_bytes=1.0,
        min_flops=1.0,
        num_bytes=num_bytes,
        flops=flops,
    )
    assert bool(row.misses) == missed


def test_the_speed_experiment_runs_and_says_what_refuses(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.open()
    summary: dict[str, Any] = kernel_speed.run(
        directory,
        models=("llama-3-8b",),
        backends=("auto", "cudnn"),
        decode_cases=((2, 64),),
        prefill_cases=((1, 16, 48),),
        copy_bytes=1 << 16,
        product_size=64,
    )
    claims = {claim.name: claim for claim in summary["claims"]}
    assert claims["decode_error_over_absolute_positions"].holds
    assert claims["prefill_error_over_absolute_positions"].holds
    assert "decode_share_of_copy" not in claims  # its case was not asked for
    rows = {(row["backend"], row["operation"]): row for row in summary["rows"]}
    assert rows["auto", "decode"]["bytes_s"] > 0
    assert rows["auto", "prefill"]["flops_s"] > 0
    assert "cudnn" in rows["cudnn", "decode"]["refused"]


def test_a_claim_whose_case_was_left_out_is_missed_and_says_nothing(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.open()
    summary: dict[str, Any] = kernel_speed.run(
        directory,
        models=("llama-3-8b",),
        decode_cases=((2, 64), (16, 8192)),
        prefill_cases=((1, 16, 48),),
        is_checked=False,
        copy_bytes=1 << 16,
        product_size=64,
        seconds=0.0,
    )
    (claim,) = summary["claims"]
    assert (claim.name, claim.value) == ("decode_share_of_copy", None)
    assert not claim.holds and summary["left_out"] == ["2 cases"]
