"""Attention of one new token per sequence over the pages of its context.

Knows pools, page tables and page-relative rotation. Does not know where pages came
from.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.online_softmax import add_block, empty_state, finish
from pallas_kernels.page_copy import from_storage
from pallas_kernels.rope import RopeTables, rotate

# Tokens of context per step of the loop: on 2 CPU cores a loop over 128 beats gathering
# the whole context from 1K tokens on.
BLOCK_TOKENS = 128


def decode_attention(
    query: Float[Array, "batch heads head_dim"],
    pool: Shaped[Array, "slots layers kv_heads 2 page_tokens head_dim"],
    page_tables: Int[Array, "batch pages_per_sequence"],
    lengths: Int[Array, " batch"],
    rope: RopeTables,
    *,
    layer: int,
) -> Float[Array, "batch heads head_dim"]:
    """Softmax attention of the token at position `lengths - 1` over tokens
    0..lengths-1.

    `query` comes unrotated; it is rotated once per page, the stored keys never. Rows of
    length 0 are padding and return zeros. What slots hold past a length is never used.
    """
    batch, heads, head_dim = query.shape
    kv_heads, page_tokens = pool.shape[2], rope.page_tokens
    block_pages = max(1, BLOCK_TOKENS // page_tokens)
    position = jnp.maximum(lengths - 1, 0)
    offset, own_page = position % page_tokens, position // page_tokens
    query_in_page = rotate(
        query.astype(jnp.float32) * head_dim**-0.5,
        rope.offset_cos[offset][:, None],
        rope.offset_sin[offset][:, None],
    )

    def attend_block(index, state):
        pages = index * block_pages + jnp.arange(block_pages)
        slots = page_tables.at[:, pages].get(mode="clip")
        stored = pool.at[slots, layer].get(mode="clip")
        key_value = from_storage(stored, query.dtype).astype(jnp.float32)
        pages_back = jnp.maximum(own_page[:, None] - pages, 0)
        relative_query = rotate(
            query_in_page[:, None],
            rope.page_cos[pages_back][:, :, None],
            rope.page_sin[pages_back][:, :, None],
        ).reshape(batch, block_pages, kv_heads, -1, head_dim)
        tokens = pages[:, None] * page_tokens + jnp.arange(page_tokens)
        in_context = tokens < lengths[:, None, None]
        key, value = key_value[:, :, :, 0], key_value[:, :, :, 1]
        score = jnp.einsum("bpkrd,bpktd->bkrpt", relative_query, key)
        score = jnp.where(in_context[:, None, None], score, -jnp.inf)
        value = jnp.where(in_context[:, :, None, :, None], value, 0)  # 0 * NaN is NaN
        flat = (batch, kv_heads, -1, block_pages * page_tokens)
        value = jnp.moveaxis(value, 2, 1).reshape(batch, kv_heads, -1, head_dim)
        return add_block(state, score.reshape(flat), value)

    num_blocks = -(-lengths.max() // (block_pages * page_tokens))
    state = empty_state((batch, kv_heads, heads // kv_heads, head_dim))
    state = jax.lax.fori_loop(0, num_blocks, attend_block, state)
    return finish(state).reshape(query.shape).astype(query.dtype)
