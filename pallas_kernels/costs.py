"""What a kernel reads and computes when every context fills its page table.

Knows shapes and block sizes. Compilers schedule by these counts, and a roofline adds
them up.
"""

import math

from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int, Shaped


def decode_cost(
    query: Float[Array, "batch heads head_dim"],
    pool: Shaped[Array, "slots layers kv_heads 2 page_tokens head_dim"],
    page_tables: Int[Array, "batch pages_per_sequence"],
) -> pl.CostEstimate:
    """Each page once; two products a token and query head."""
    batch, heads, head_dim = query.shape
    context = page_tables.shape[1] * pool.shape[4]
    return pl.CostEstimate(
        flops=4 * batch * heads * head_dim * context,
        transcendentals=batch * heads * context,
        bytes_accessed=batch * context * _token_bytes(pool) + _in_and_out(query),
    )


def prefill_cost(
    query: Float[Array, "batch new_tokens heads head_dim"],
    pool: Shaped[Array, "slots layers kv_heads 2 page_tokens head_dim"],
    page_tables: Int[Array, "batch pages_per_sequence"],
    *,
    query_tokens: int,
    block_tokens: int,
    reads_per_block: bool,
) -> pl.CostEstimate:
    """Whole blocks of context up to the last token of each block of queries.

    Args:
        reads_per_block: whether each block of queries reads its context from device
            memory again; else once.
    """
    batch, new_tokens, heads, head_dim = query.shape
    context = page_tables.shape[1] * pool.shape[4]
    start = max(0, context - new_tokens)
    seen = pairs = 0
    for first in range(0, new_tokens, query_tokens):
        end = min(start + first + query_tokens, context)
        blocks = math.ceil(end / block_tokens) * block_tokens
        seen += end
        pairs += blocks * query_tokens
    reads = seen if reads_per_block else context
    return pl.CostEstimate(
        flops=4 * batch * heads * head_dim * pairs,
        transcendentals=batch * heads * pairs,
        bytes_accessed=batch * reads * _token_bytes(pool) + _in_and_out(query),
    )


def _token_bytes(pool: Array) -> int:
    """K and V of one token in one layer."""
    _, _, kv_heads, _, _, head_dim = pool.shape
    return 2 * kv_heads * head_dim * pool.dtype.itemsize


def _in_and_out(query: Array) -> int:
    return 2 * query.size * query.dtype.itemsize
