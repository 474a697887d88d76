"""Prefill attention through cuDNN, on keys that a gather turns to absolute positions.

Knows what cuDNN can be asked through jax. Does not know how it computes.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.backends import DEFAULT_BLOCKS, Blocks, require
from pallas_kernels.rope import RopeTables, rotate, rotate_to


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
    implementation: str = "cudnn",
) -> Float[Array, "batch new_tokens heads head_dim"]:
    """`prefill_attention` as two library calls, merged by their sums of weights.

    cuDNN's causal mask starts at the first key and takes no offset, so the history
    (every new token sees all of it) and the new tokens (causal) are two calls. The
    gather copies the whole width of `page_tables`.

    Args:
        implementation: that of `jax.nn.dot_product_attention`; "xla" runs anywhere.
    """
    new_tokens, head_dim = query.shape[1], query.shape[3]
    require(query.dtype == pool.dtype == jnp.bfloat16, "cudnn", f"{query.dtype} pages")
    require(head_dim in (64, 128), "cudnn", f"head_dim={head_dim}")
    require(window is None and soft_cap is None, "cudnn", "a window or a soft cap")
    position = starts[:, None] + jnp.arange(new_tokens)
    rotated = rotate_to(query.astype(jnp.float32), position, rope).astype(query.dtype)

    num_pages = page_tables.shape[1]
    stored = pool.at[page_tables, layer].get(mode="clip").astype(jnp.float32)
    keys = rotate(
        stored[:, :, :, 0],
        rope.page_cos[:num_pages, None, None],
        rope.page_sin[:num_pages, None, None],
    )
    history = _attend(
        rotated,
        _in_order(keys, starts, query.dtype),
        _in_order(stored[:, :, :, 1], starts, query.dtype),
        lengths=starts,
        is_causal=False,
        implementation=implementation,
    )
    own = jnp.clip(position, 0, num_pages * rope.page_tokens - 1)
    page, offset = own // rope.page_tokens, own % rope.page_tokens
    slots = jnp.take_along_axis(page_tables, page, axis=1, mode="clip")
    fresh = pool[slots, layer, :, :, offset].astype(jnp.float32)
    is_new = (position < lengths[:, None])[..., None, None, None]
    fresh = jnp.where(is_new, fresh, 0)
    keys = rotate(
        fresh[:, :, :, 0],
        rope.page_cos[page][:, :, None],
        rope.page_sin[page][:, :, None],
    )
    own_part = _attend(
        rotated,
        keys.astype(query.dtype),
        fresh[:, :, :, 1].astype(query.dtype),
        lengths=jnp.maximum(lengths - starts, 0),
        is_causal=True,
        implementation=implementation,
    )
    return _merge(history, own_part, has_history=starts > 0).astype(query.dtype)


def _in_order(
    pages: Float[Array, "batch pages kv_heads page_tokens head_dim"],
    lengths: Int[Array, " batch"],
    dtype: jnp.dtype,
) -> Float[Array, "batch tokens kv_heads head_dim"]:
    """Pages as one run of tokens, zeros past each length: 0 * NaN is NaN."""
    tokens = jnp.swapaxes(pages, 2, 3)
    tokens = tokens.reshape(tokens.shape[0], -1, *tokens.shape[3:])
    in_context = jnp.arange(tokens.shape[1]) < lengths[:, None]
    return jnp.where(in_context[..., None, None], tokens, 0).astype(dtype)


def _attend(query, key, value, *, lengths, is_causal, implementation):
    num_new = jnp.full(lengths.shape, query.shape[1], jnp.int32)
    try:
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            query_seq_lengths=num_new,
            key_value_seq_lengths=jnp.maximum(lengths, 1),
            is_causal=is_causal,
            implementation=implementation,
            return_residual=True,
        )
    except RuntimeError as error:  # it looks for the library before it traces
        raise NotImplementedError(f'backend="cudnn": {error}') from error


def _merge(first, second, *, has_history):
    """The softmax over two parts of a context from those over each part."""
    (first_out, first_log), (second_out, second_log) = first, second
    first_log = jnp.where(has_history[:, None, None], first_log, -jnp.inf)
    share = jax.nn.sigmoid(second_log - first_log)[..., None]
    return second_out * share + jnp.where(share < 1, first_out, 0) * (1 - share)
