"""The references: paged attention in plain jax, for every platform.

Knows pools, page tables and page-relative rotation. Does not know where pages came
from. The loops run over blocks of pages up to the longest context of the batch, so that
the time follows the lengths and not the width of the page table.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from pallas_kernels.backends import DEFAULT_BLOCKS, Blocks
from pallas_kernels.online_softmax import add_block, empty_state, finish
from pallas_kernels.page_copy import from_storage
from pallas_kernels.rope import RopeTables, rotate, rotate_to

# Tokens of context per step: on 2 CPU cores a loop over 128 beats gathering the whole
# context from 1K tokens on.
DECODE_TOKENS, PREFILL_TOKENS = 128, 256


def decode(
    query: Float[Array, "batch heads head_dim"],
    pool: Shaped[Array, "slots layers kv_heads 2 page_tokens head_dim"],
    page_tables: Int[Array, "batch pages_per_sequence"],
    lengths: Int[Array, " batch"],
    rope: RopeTables,
    *,
    layer: int,
    window: int | None = None,
    soft_cap: float | None = None,
    blocks: Blocks = DEFAULT_BLOCKS,
) -> Float[Array, "batch heads head_dim"]:
    """`decode_attention` that rotates the query once per page."""
    batch, heads, head_dim = query.shape
    kv_heads, page_tokens = pool.shape[2], rope.page_tokens
    block_pages = max(1, (blocks.context_tokens or DECODE_TOKENS) // page_tokens)
    block_tokens = block_pages * page_tokens
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
        tokens = index * block_tokens + jnp.arange(block_tokens)
        in_context = tokens < lengths[:, None]
        visible = _is_visible(tokens, position[:, None], window) & in_context
        key, value = key_value[:, :, :, 0], key_value[:, :, :, 1]
        score = jnp.einsum("bpkrd,bpktd->bkrpt", relative_query, key)
        score = score.reshape(batch, kv_heads, -1, block_tokens)
        score = jnp.where(visible[:, None, None], _cap(score, soft_cap), -jnp.inf)
        value = jnp.moveaxis(value, 2, 1).reshape(batch, kv_heads, -1, head_dim)
        value = jnp.where(in_context[:, None, :, None], value, 0)  # 0 * NaN is NaN
        return add_block(state, score, value)

    state = empty_state((batch, kv_heads, heads // kv_heads, head_dim))
    num_blocks = -(-lengths.max() // block_tokens)
    state = jax.lax.fori_loop(0, num_blocks, attend_block, state)
    return finish(state).reshape(query.shape).astype(query.dtype)


def prefill(
    query: Float[Array, "batch new_tokens heads head_dim"],
    pool: Shaped[Array, "slots layers kv_heads 2 page_tokens head_dim"],
    page_tables: Int[Array, "batch pages_per_sequence"],
    starts: Int[Array, " batch"],
    lengths: Int[Array, " batch"],
    rope: RopeTables,
    *,
    layer: int,
    window: int | None = None,
    soft_cap: float | None = None,
    blocks: Blocks = DEFAULT_BLOCKS,
) -> Float[Array, "batch new_tokens heads head_dim"]:
    """`prefill_attention` that rotates keys by whole pages while it gathers them.

    That costs less than to rotate 16 queries or more once per page.
    """
    batch, new_tokens, heads, head_dim = query.shape
    kv_heads, page_tokens = pool.shape[2], rope.page_tokens
    block_pages = max(1, (blocks.context_tokens or PREFILL_TOKENS) // page_tokens)
    block_tokens = block_pages * page_tokens
    position = starts[:, None] + jnp.arange(new_tokens)
    rotated = rotate_to(query.astype(jnp.float32) * head_dim**-0.5, position, rope)
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
        tokens = index * block_tokens + jnp.arange(block_tokens)
        in_context = tokens < lengths[:, None]
        value = jnp.where(in_context[:, None, :, None], value, 0)  # 0 * NaN is NaN
        visible = _is_visible(tokens, position[:, :, None], window)
        visible &= in_context[:, None]
        score = jnp.einsum("bkrd,bktd->bkrt", rotated, key)
        score = _cap(score, soft_cap)
        score = score.reshape(batch, kv_heads, -1, new_tokens, block_tokens)
        score = jnp.where(visible[:, None, None], score, -jnp.inf)
        return add_block(state, score.reshape(batch, kv_heads, -1, block_tokens), value)

    num_blocks = -(-lengths.max() // block_tokens)
    state = empty_state((batch, kv_heads, rotated.shape[2], head_dim))
    state = jax.lax.fori_loop(0, num_blocks, attend_block, state)
    output = finish(state).reshape(batch, heads, new_tokens, head_dim)
    return jnp.moveaxis(output, 1, 2).astype(query.dtype)


def _is_visible(
    tokens: Int[Array, " tokens"], position: Int[Array, "*rows 1"], window: int | None
) -> Bool[Array, "*rows tokens"]:
    visible = tokens <= position
    return visible if window is None else visible & (tokens > position - window)


def _cap(score: Float[Array, "..."], soft_cap: float | None) -> Float[Array, "..."]:
    return score if soft_cap is None else soft_cap * jnp.tanh(score / soft_cap)
