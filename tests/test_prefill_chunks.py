"""How a prompt is cut into programs."""

from hypothesis import given
from hypothesis import strategies as st

from cachedattn_jax.engine.prefill import plan_chunks


@given(st.integers(1, 5000))
def test_every_token_is_computed_once_and_padding_is_small(num_tokens):
    chunks = plan_chunks(num_tokens, (16, 64, 256))
    assert sum(tokens for tokens, _ in chunks) == num_tokens
    assert all(0 < tokens <= size for tokens, size in chunks)
    padded = sum(size for _, size in chunks)
    assert padded - num_tokens < max(16, 0.34 * num_tokens)
    assert len(chunks) <= num_tokens // 256 + 8


def test_chunks_are_as_large_as_they_can_be():
    assert plan_chunks(600, (16, 64, 256)) == [
        (256, 256),
        (256, 256),
        (64, 64),
        (16, 16),
        (8, 16),
    ]
    assert plan_chunks(250, (16, 64, 256)) == [(250, 256)]
    assert plan_chunks(3, (16, 64)) == [(3, 16)]
