"""Attention of one new token per sequence over pages, as a Pallas kernel for TPU.

Knows pools in HBM, page tables and page-relative rotation. Does not know where pages
came from. `decode_attention.py` says the same in jax.numpy.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.backends import DEFAULT_BLOCKS, Blocks, require
from pallas_kernels.costs import decode_cost
from pallas_kernels.rope import RopeTables, rotate
from pallas_kernels.tpu_online_softmax import (
    MASKED,
    add_block,
    cap_scores,
    clear,
    dot,
    finish,
    softmax_scratch,
)
from pallas_kernels.tpu_page_blocks import (
    LANES,
    check_supported,
    plan_visits,
    rotate_by_pages,
    run_programs,
    swap_halves,
    visit_blocks,
    zero_values_from,
)

BLOCK_TOKENS = 512
BLOCK_BYTES = 4 << 20  # of one of the two buffers
MOST_BLOCK_BYTES = 16 << 20
SUBLANES = 8


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
    interpret: bool = False,
) -> Float[Array, "batch heads head_dim"]:
    """Softmax attention of the token at position `lengths - 1` over tokens
    0..lengths-1.

    `query` comes unrotated; it is rotated once per page, the stored keys never. Rows of
    length 0 are padding and return zeros. Only pages that hold a visible token are
    read.
    """
    batch, heads, head_dim = query.shape
    slots, _, kv_heads, _, page_tokens, _ = pool.shape
    width = page_tables.shape[1]
    check_supported(query, pool, page_tables)
    block_pages = _block_pages(pool, width, blocks)
    lengths = jnp.clip(lengths, 0, width * page_tokens).astype(jnp.int32)
    first_page = jnp.zeros_like(lengths)
    if window is not None:
        first_page = jnp.maximum(lengths - window, 0) // page_tokens
    # The cores of a v5p take one chain each; one core takes them one after the other.
    chains = 2 if batch % 2 == 0 else 1
    visits = plan_visits(
        first_page,
        pl.cdiv(lengths, page_tokens),
        block_pages=block_pages,
        chains=chains,
    )
    group_size = heads // kv_heads
    rows = pl.cdiv(group_size, SUBLANES) * SUBLANES
    grouped = _rotated_by_offset(query, lengths, rope).reshape(
        chains, batch // chains, kv_heads, group_size, head_dim
    )
    output = run_programs(
        functools.partial(_kernel, layer=layer, window=window, soft_cap=soft_cap),
        [visits, jnp.clip(page_tables, 0, slots - 1).astype(jnp.int32), lengths],
        jnp.pad(grouped, [(0, 0)] * 3 + [(0, rows - group_size), (0, 0)]),
        rope,
        pool,
        buffer=(kv_heads, 2, block_pages, page_tokens, head_dim),
        state=softmax_scratch(kv_heads, rows, head_dim=head_dim),
        cost=decode_cost(query, pool, page_tables),
        name="paged_decode",
        interpret=interpret,
    )
    return output[:, :, :, :group_size].reshape(query.shape)


def _kernel(
    visits_ref,  # SMEM [5, batch]
    tables_ref,  # SMEM [batch, pages_per_sequence]
    lengths_ref,  # SMEM [batch]
    query_ref,  # VMEM [1, 1, kv_heads, rows, head_dim] float32
    cos_ref,  # VMEM [pages_per_sequence, head_dim]
    sin_ref,  # VMEM [pages_per_sequence, head_dim]
    pool_ref,  # HBM [slots, layers, kv_heads, 2, page_tokens, head_dim]
    output_ref,  # VMEM [1, 1, kv_heads, rows, head_dim]
    buffers,  # VMEM [2, kv_heads, 2, block_pages, page_tokens, head_dim]
    semaphores,  # one a buffer
    *state,  # of [kv_heads, rows]
    layer: int,
    window: int | None,
    soft_cap: float | None,
):
    _, kv_heads, _, block_pages, page_tokens, _ = buffers.shape
    row = pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)
    length = lengths_ref[row]
    own_page = jnp.maximum(length - 1, 0) // page_tokens
    clear(state)

    def make_copy(program, page, buffer, place):
        return pltpu.make_async_copy(
            pool_ref.at[tables_ref[program, page], layer],
            buffers.at[buffer, :, :, place],
            semaphores.at[buffer],
        )

    def compute(first_page, buffer):
        zero_values_from(length, first_page, buffers.at[buffer, :, 1])
        pages_back = [
            jnp.maximum(own_page - first_page - place, 0)
            for place in range(block_pages)
        ]

        @pl.loop(0, kv_heads)
        def _(head):
            query = query_ref[0, 0, head]
            swapped = swap_halves(query)
            rotated = [
                rotate_by_pages(query, swapped, cos_ref, sin_ref, back)
                for back in pages_back
            ]
            score = _scores(jnp.stack(rotated), buffers[buffer, head, 0])
            token = first_page * page_tokens + _token_in_block(score.shape)
            visible = token < length
            if window is not None:
                visible &= token >= length - window
            score = jnp.where(visible, cap_scores(score, soft_cap), MASKED)
            value = buffers[buffer, head, 1]
            value = value.reshape(score.shape[0], score.shape[2], value.shape[-1])
            add_block([ref.at[head] for ref in state], score, value)

    visit_blocks(visits_ref, row, make_copy, compute, block_pages=block_pages)

    @pl.loop(0, kv_heads)
    def _(head):
        output = finish([ref.at[head] for ref in state])
        output_ref[0, 0, head] = output.astype(output_ref.dtype)


def _scores(rotated, key):
    """[chunks, rows, tokens of a chunk], for queries [pages, rows, head_dim] and keys
    [pages, page_tokens, head_dim].

    A chunk is as many pages as fill the lanes. It is one product of the queries of all
    its pages with all its keys, of which the page of each token is kept: with 16
    tokens a page 64 rows instead of 8 pass by keys whose loading costs the MXU more
    than that.
    """
    pages, rows, head_dim = rotated.shape
    page_tokens = key.shape[1]
    chunk_pages = math.gcd(pages, max(1, LANES // page_tokens))
    chunks, tokens = pages // chunk_pages, chunk_pages * page_tokens
    rotated = rotated.reshape(chunks, chunk_pages * rows, head_dim).astype(key.dtype)
    score = dot(rotated, key.reshape(chunks, tokens, head_dim), over=2)
    if chunk_pages == 1:
        return score
    score = score.reshape(chunks, chunk_pages, rows, tokens)
    page = jax.lax.broadcasted_iota(jnp.int32, score.shape, 1)
    token = jax.lax.broadcasted_iota(jnp.int32, score.shape, 3)
    return jnp.where(token // page_tokens == page, score, 0).sum(axis=1)


def _token_in_block(shape):
    chunk = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return chunk * shape[-1] + jax.lax.broadcasted_iota(jnp.int32, shape, 2)


def _rotated_by_offset(query, lengths, rope):
    offset = jnp.maximum(lengths - 1, 0) % rope.page_tokens
    return rotate(
        query.astype(jnp.float32) * query.shape[-1] ** -0.5,
        rope.offset_cos[offset][:, None],
        rope.offset_sin[offset][:, None],
    )


def _block_pages(pool, width, blocks):
    _, _, kv_heads, _, page_tokens, head_dim = pool.shape
    page_bytes = kv_heads * 2 * page_tokens * max(head_dim, LANES) * pool.dtype.itemsize
    if blocks.context_tokens is not None:
        pages = blocks.context_tokens // page_tokens
    else:
        pages = min(BLOCK_TOKENS // page_tokens, BLOCK_BYTES // page_bytes)
    pages = min(max(1, pages), width)
    require(
        pages * page_bytes <= MOST_BLOCK_BYTES,
        "mosaic_tpu",
        f"blocks of {pages * page_tokens} tokens x {kv_heads} kv heads, only up to "
        f"{MOST_BLOCK_BYTES >> 20} MiB",
    )
    return pages
