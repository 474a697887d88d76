"""Prefill attention through cuDNN, on keys that a gather turns to absolute positions.

Knows what cuDNN can be asked through jax. Does not know how it computes.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.backends import DEFAULT_BLOCKS, Blocks, require
from pallas_kernels.rope import RopeTables, rotate, rotate_to


def prefill(
    query: Float[Array, "batch new_tokens heads head_dim"],
    pool: Shaped[Array, "slots layers kv_heads 2 page_tokens head_dim"],
    page_tables: Int[Array, "batch pages_per_sequence"],
    lengths: Int[Array, " batch"],
    rope: RopeTables,
    *,
    layer: int,
    window: int | None = None,
    soft_cap: float | None = None,
    blocks: Blocks = DEFAULT_BLOCKS,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "batch new_tokens heads head_dim"]:
    """`prefill_attention` of tokens that have no history.

    cuDNN's causal mask starts at the first key and takes no offset. A history would be
    a call of its own, and jax rounds the sums of weights that would merge both to
    bfloat16: 2.3 times the error of one call, measured on an H100.

    Args:
        implementation: that of `jax.nn.dot_product_attention`; "xla" runs anywhere.
    """
    new_tokens, head_dim = query.shape[1], query.shape[3]
    require(query.dtype == pool.dtype == jnp.bfloat16, "cudnn", f"{query.dtype} pages")
    require(head_dim in (64, 128), "cudnn", f"head_dim={head_dim}")
    require(window is None and soft_cap is None, "cudnn", "a window or a soft cap")
    position = jnp.broadcast_to(jnp.arange(new_tokens), query.shape[:2])
    rotated = rotate_to(query.astype(jnp.float32), position, rope).astype(query.dtype)
    page = jnp.arange(-(-new_tokens // rope.page_tokens))
    page = jnp.minimum(page, page_tables.shape[1] - 1)  # padding may lie past the last
    stored = pool.at[page_tables[:, page], layer].get(mode="clip").astype(jnp.float32)
    keys = rotate(
        stored[:, :, :, 0],
        rope.page_cos[page][:, None, None],
        rope.page_sin[page][:, None, None],
    )
    key, value = (
        _in_order(pages, new_tokens, lengths).astype(query.dtype)
        for pages in (keys, stored[:, :, :, 1])
    )
    try:
        return jax.nn.dot_product_attention(
            rotated, key, value, is_causal=True, implementation=implementation
        )
    except RuntimeError as error:  # it looks for the library before it traces
        raise NotImplementedError(f'backend="cudnn": {error}') from error


def _in_order(
    pages: Float[Array, "batch pages kv_heads page_tokens head_dim"],
    num_tokens: int,
    lengths: Int[Array, " batch"],
) -> Float[Array, "batch tokens kv_heads head_dim"]:
    """Pages as one run of tokens, zeros past each length: 0 * NaN is NaN."""
    tokens = jnp.swapaxes(pages, 2, 3)
    tokens = tokens.reshape(tokens.shape[0], -1, *tokens.shape[3:])[:, :num_tokens]
    in_context = jnp.arange(num_tokens) < lengths[:, None]
    return jnp.where(in_context[..., None, None], tokens, 0)
