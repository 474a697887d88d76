"""How a prompt is cut into programs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachedattn_jax.engine.chunks import plan_chunks
from cachedattn_jax.engine.prefill import has_history
from pallas_kernels.prefill_attention import FRESH_TOKENS

SIZES = (16, 32, 64, 256)


@given(st.integers(1, 5000))
def test_every_token_is_computed_once_and_padding_is_small(num_tokens):
    chunks = plan_chunks(num_tokens, SIZES)
    assert sum(tokens for tokens, _ in chunks) == num_tokens
    assert all(0 < tokens <= size for tokens, size in chunks)
    padded = sum(size for _, size in chunks)
    assert padded - num_tokens < 64
    assert len(chunks) <= num_tokens // 256 + 4


@given(st.integers(1, 256))
def test_no_single_piece_would_be_cheaper(num_tokens):
    chunks = plan_chunks(num_tokens, SIZES)
    cost = sum(size + 28 for _, size in chunks)
    assert cost <= min(size + 28 for size in SIZES if size >= num_tokens)


def test_chunks_are_as_large_as_they_can_be():
    assert plan_chunks(1000, SIZES)[:2] == [(256, 256), (256, 256)]
    assert plan_chunks(250, SIZES) == [(250, 256)]
    assert plan_chunks(17, SIZES) == [(17, 32)]
    assert plan_chunks(3, SIZES) == [(3, 16)]


def test_where_a_call_costs_much_there_are_fewer_of_them():
    sizes = (128, 512, 2048)
    for num_tokens, cheap, dear in (
        (524, 2, 2),
        (870, 4, 2),
        (1600, 4, 1),
        (100, 1, 1),
    ):
        assert len(plan_chunks(num_tokens, sizes, call_tokens=28)) == cheap
        assert len(plan_chunks(num_tokens, sizes, call_tokens=400)) == dear


@pytest.mark.parametrize("start", [1, 64, 8192])
def test_a_chunk_with_tokens_before_it_always_reads_them(start):
    for num_tokens in (1, FRESH_TOKENS - 1, FRESH_TOKENS, 4 * FRESH_TOKENS):
        assert has_history(num_tokens, start)


def test_only_long_chunks_at_the_start_have_a_program_without_a_history():
    assert has_history(FRESH_TOKENS - 1, 0)
    assert not has_history(FRESH_TOKENS, 0)
