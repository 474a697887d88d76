"""Moves pages into, out of and within a pool of device slots.

Knows pools, slots and the rotation a page stores. Does not know sessions or tiers.

A pool holds one layer group: [slots, layers, kv_heads, 2, page_tokens, head_dim], K
before V. Slots at or past the end of the pool are dropped by writes, which is how a
fixed-size call moves fewer pages. Every write replaces whole pages: XLA on TPU
relayouts (copies) the pool for single-token writes, on CPU and GPU whole pages are as
good.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels import tpu_page_copy
from pallas_kernels.backends import AUTO, resolve_backend
from pallas_kernels.rope import RopeTables, rotate


def to_storage(x: Float[Array, "..."], dtype: jnp.dtype) -> Shaped[Array, "..."]:
    """The bits of `x` as the storage dtype of a pool: `x.dtype`, or uint16 for
    bfloat16.

    Every in-place write to a bfloat16 array on CPU with jax 0.10 copies the array
    (0.7-1.1 s a decode step on a 1 GB pool); a uint16 array of the same bits does not.
    """
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def from_storage(x: Shaped[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """The values behind the stored bits of `to_storage`."""
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def install_pages(
    pool: Shaped[Array, "slots layers kv_heads 2 page_tokens head_dim"],
    pages: Shaped[Array, "pages layers kv_heads 2 page_tokens head_dim"],
    slots: Int[Array, " pages"],
) -> Shaped[Array, "slots layers kv_heads 2 page_tokens head_dim"]:
    """Writes arrived pages into their slots; in place when `pool` is donated."""
    slots = _distinct(slots, pool.shape[0])
    return pool.at[slots].set(pages, mode="drop", unique_indices=True)


def extract_pages(
    pool: Shaped[Array, "slots layers kv_heads 2 page_tokens head_dim"],
    slots: Int[Array, " pages"],
    *,
    backend: str = "auto",
    interpret: bool = False,
) -> Shaped[Array, "pages layers kv_heads 2 page_tokens head_dim"]:
    """Copies the pages in `slots` into an array of their own."""
    if resolve_backend(backend, AUTO) == "mosaic_tpu":
        return tpu_page_copy.extract_pages(pool, slots, interpret=interpret)
    return pool.at[slots].get(mode="clip")


def _distinct(slots: Int[Array, "*shape"], num_slots: int) -> Int[Array, "*shape"]:
    """Slots of which those past the pool differ, too.

    Told that no two writes meet, XLA for CUDA writes whole vectors; else it writes
    element by element with atomic stores.
    """
    past = num_slots + jnp.arange(slots.size, dtype=slots.dtype).reshape(slots.shape)
    return jnp.where(slots < num_slots, slots, past)


def append_tokens(
    pool: Shaped[Array, "slots layers kv_heads 2 page_tokens head_dim"],
    key: Float[Array, "batch new_tokens kv_heads head_dim"],
    value: Float[Array, "batch new_tokens kv_heads head_dim"],
    page_tables: Int[Array, "batch pages_per_sequence"],
    starts: Int[Array, " batch"],
    lengths: Int[Array, " batch"],
    rope: RopeTables,
    *,
    layer: int,
    backend: str = "auto",
    interpret: bool = False,
) -> Shaped[Array, "slots layers kv_heads 2 page_tokens head_dim"]:
    """Writes the tokens at positions starts..lengths-1 of each sequence into its pages.

    Reads, modifies and writes whole pages. A decode writes single tokens: on TPU with a
    kernel, on CUDA with XLA, which does that in place there, while it would read the
    pages of all layers at once (0.8 GB of temporaries in a step of Llama-2-13B). Keys
    come unrotated and are stored rotated by their offset inside the page. Tokens of
    `key` past `lengths - starts` are padding.
    """
    new_tokens, page_tokens = key.shape[1], rope.page_tokens
    offset = (starts[:, None] + jnp.arange(new_tokens)) % page_tokens
    key = rotate(
        key, rope.offset_cos[offset][:, :, None], rope.offset_sin[offset][:, :, None]
    )
    tokens = to_storage(jnp.stack([key, value], axis=3), pool.dtype)
    num_pages = (new_tokens + page_tokens - 2) // page_tokens + 1
    pages = starts[:, None] // page_tokens + jnp.arange(num_pages)
    written = pages * page_tokens < lengths[:, None]
    table = jnp.take_along_axis(page_tables, pages, axis=1, mode="clip")
    slots = _distinct(jnp.where(written, table, pool.shape[0]), pool.shape[0])

    backend = resolve_backend(backend, AUTO)
    if new_tokens == 1 and backend != "xla":
        slots = jnp.where(starts < lengths, slots[:, 0], pool.shape[0])
        slots = _distinct(slots, pool.shape[0])
        token, offset = tokens[:, 0], offset[:, 0]
        if backend == "mosaic_tpu":
            return tpu_page_copy.append_token(
                pool, token, slots, offset, layer=layer, interpret=interpret
            )
        return pool.at[slots, layer, :, :, offset].set(
            token, mode="drop", unique_indices=True
        )

    position = pages[..., None] * page_tokens + jnp.arange(page_tokens)
    token = position - starts[:, None, None]
    is_new = (token >= 0) & (position < lengths[:, None, None])
    if new_tokens == 1:
        fresh = tokens[:, :, :, :, None]  # [batch, 1, kv, 2, 1, dim]
    else:
        rows = jnp.arange(tokens.shape[0])[:, None, None]
        fresh = tokens.at[rows, token].get(mode="clip")  # [batch, pages, offset, ...]
        fresh = jnp.moveaxis(fresh, 2, 4)
    if backend == "mosaic_tpu":
        stored = tpu_page_copy.extract_pages(
            pool, table.ravel(), layer=layer, interpret=interpret
        ).reshape(*table.shape, *pool.shape[2:])
    else:
        stored = pool.at[table, layer].get(mode="clip")
    merged = jnp.where(is_new[:, :, None, None, :, None], fresh, stored)
    return pool.at[slots, layer].set(merged, mode="drop", unique_indices=True)


def move_tokens(
    pool: Shaped[Array, "slots layers kv_heads 2 page_tokens head_dim"],
    slots: Int[Array, " pages"],
    source_slots: Int[Array, "pages page_tokens"],
    source_offsets: Int[Array, "pages page_tokens"],
    cos: Float[Array, "pages page_tokens half"],
    sin: Float[Array, "pages page_tokens half"],
    *,
    dtype: str,
) -> Shaped[Array, "slots layers kv_heads 2 page_tokens head_dim"]:
    """Fills pages with single tokens of others, their keys rotated on the way.

    All tokens are read before any is written, so that pages may be their own source.

    Args:
        cos, sin: of the angles by which each key is turned.
        dtype: of the values; the pool may hold their bits as another type.
    """
    stored = pool.at[source_slots, :, :, :, source_offsets].get(mode="clip")
    tokens = from_storage(stored, jnp.dtype(dtype))  # [pages, tokens, layers, kv, 2, d]
    key = rotate(tokens[..., 0, :], cos[:, :, None, None], sin[:, :, None, None])
    tokens = jnp.stack([key, tokens[..., 1, :]], axis=-2)
    pages = jnp.moveaxis(to_storage(tokens, pool.dtype), 1, 4)
    return install_pages(pool, pages, slots)
