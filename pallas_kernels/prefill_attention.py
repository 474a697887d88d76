"""Causal attention of new tokens over the pages of their context, themselves included.

Knows pools, page tables and page-relative rotation. Does not know where pages came
from.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.online_softmax import add_block, empty_state, finish
from pallas_kernels.page_copy import from_storage
from pallas_kernels.rope import RopeTables, rotate

BLOCK_TOKENS = 256  # tokens of context per step of the loop


def prefill_attention(
    query: Float[Array, "batch new_tokens heads head_dim"],
    pool: Shaped[Array, "slots layers kv_heads 2 page_tokens head_dim"],
    page_tables: Int[Array, "batch pages_per_sequence"],
    starts: Int[Array, " batch"],
    lengths: Int[Array, " batch"],
    rope: RopeTables,
    *,
    layer: int,
) -> Float[Array, "batch new_tokens heads head_dim"]:
    """Softmax attention of the tokens at starts, starts+1, ... over tokens
    0..lengths-1.

    Token t sees positions up to `starts + t`; its own keys are in the pages already.
    `query` comes unrotated; stored keys are rotated by whole pages while they are
    gathered, which costs less than rotating 16 queries or more once per page. Tokens
    past `lengths - starts` are padding: their outputs are finite and mean nothing.
    """
    batch, new_tokens, heads, head_dim = query.shape
    kv_heads, page_tokens = pool.shape[2], rope.page_tokens
    block_pages = max(1, BLOCK_TOKENS // page_tokens)
    position = starts[:, None] + jnp.arange(new_tokens)
    rotated = _rotate_to(query.astype(jnp.float32) * head_dim**-0.5, position, rope)
    rotated = jnp.moveaxis(rotated, 1, 2)
    rotated = rotated.reshape(batch, kv_heads, -1, head_dim)  # group-major rows

    def attend_block(index, state):
        pages = index * block_pages + jnp.arange(block_pages)
        slots = page_tables.at[:, pages].get(mode="clip")
        stored = pool.at[slots, layer].get(mode="clip")
        key_value = from_storage(stored, query.dtype).astype(jnp.float32)
        key_value = jnp.moveaxis(key_value, 1, 3)  # [batch, kv_heads, 2, page, t, dim]
        key = rotate(
            key_value[:, :, 0],
            rope.page_cos[pages][:, None],
            rope.page_sin[pages][:, None],
        ).reshape(batch, kv_heads, -1, head_dim)
        value = key_value[:, :, 1].reshape(batch, kv_heads, -1, head_dim)
        tokens = index * block_pages * page_tokens + jnp.arange(key.shape[2])
        in_context = tokens < lengths[:, None]
        value = jnp.where(in_context[:, None, :, None], value, 0)  # 0 * NaN is NaN
        visible = in_context[:, None] & (tokens <= position[:, :, None])
        score = jnp.einsum("bkrd,bktd->bkrt", rotated, key)
        score = score.reshape(batch, kv_heads, -1, new_tokens, key.shape[2])
        score = jnp.where(visible[:, None, None], score, -jnp.inf)
        return add_block(state, score.reshape(batch, kv_heads, -1, key.shape[2]), value)

    num_blocks = -(-lengths.max() // (block_pages * page_tokens))
    state = empty_state((batch, kv_heads, rotated.shape[2], head_dim))
    state = jax.lax.fori_loop(0, num_blocks, attend_block, state)
    output = finish(state).reshape(batch, heads, new_tokens, head_dim)
    return jnp.moveaxis(output, 1, 2).astype(query.dtype)


def _rotate_to(
    query: Float[Array, "batch new_tokens heads head_dim"],
    position: Int[Array, "batch new_tokens"],
    rope: RopeTables,
) -> Float[Array, "batch new_tokens heads head_dim"]:
    """R(position) query, as a rotation by the offset after one by the pages."""
    page, offset = position // rope.page_tokens, position % rope.page_tokens
    query = rotate(
        query, rope.page_cos[page][:, :, None], rope.page_sin[page][:, :, None]
    )
    return rotate(
        query, rope.offset_cos[offset][:, :, None], rope.offset_sin[offset][:, :, None]
    )
