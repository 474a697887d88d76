"""Causal attention of new tokens over pages, as a Pallas kernel for TPU.

Knows pools in HBM, page tables and page-relative rotation. Does not know where pages
came from. `prefill_attention.py` says the same in jax.numpy.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.backends import DEFAULT_BLOCKS, Blocks
from pallas_kernels.costs import prefill_cost
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
    check_supported,
    plan_visits,
    rotate_by_pages,
    run_programs,
    swap_halves,
    visit_blocks,
    zero_values_from,
)

QUERY_ROWS = 512
BLOCK_TOKENS = 512
ROW_TILE = 16  # sublanes of a bfloat16 tile


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
    interpret: bool = False,
) -> Float[Array, "batch new_tokens heads head_dim"]:
    """Softmax attention of the tokens at starts, starts+1, ... over tokens
    0..lengths-1.

    Token t sees positions up to `starts + t`; its own keys are in the pages already.
    `query` comes unrotated; stored keys are rotated by whole pages in VMEM. Tokens past
    `lengths - starts` are padding: their outputs are finite and mean nothing.
    """
    batch, new_tokens, heads, head_dim = query.shape
    slots, _, kv_heads, _, page_tokens, _ = pool.shape
    width, group_size = page_tables.shape[1], heads // kv_heads
    check_supported(query, pool, page_tables)
    block_tokens = blocks.context_tokens or BLOCK_TOKENS
    block_pages = min(max(1, block_tokens // page_tokens), width)
    query_tokens = _query_tokens(new_tokens, group_size, blocks)
    lengths = jnp.clip(lengths, 0, width * page_tokens).astype(jnp.int32)
    starts = starts.astype(jnp.int32)

    begins = starts[:, None] + jnp.arange(0, new_tokens, query_tokens, dtype=jnp.int32)
    ends = jnp.minimum(begins + query_tokens, lengths[:, None])
    first_seen = jnp.zeros_like(begins)
    if window is not None:
        first_seen = jnp.maximum(begins - window + 1, 0)
    visits = plan_visits(
        (first_seen // page_tokens).ravel(),
        jnp.where(begins < ends, pl.cdiv(ends, page_tokens), 0).ravel(),
        block_pages=block_pages,
        chains=1,
    )
    tables = jnp.clip(page_tables, 0, slots - 1).astype(jnp.int32)
    grouped = _by_program(
        _rotated(query, starts, lengths, rope), kv_heads, query_tokens
    )
    output = run_programs(
        functools.partial(
            _kernel,
            layer=layer,
            window=window,
            soft_cap=soft_cap,
            group_size=group_size,
            programs_per_sequence=begins.shape[1],
        ),
        [visits, tables, begins.ravel(), ends.ravel()],
        grouped,
        rope,
        pool,
        buffer=(2, block_pages, page_tokens, head_dim),
        state=softmax_scratch(grouped.shape[2], head_dim=head_dim),
        cost=prefill_cost(
            query,
            pool,
            page_tables,
            query_tokens=query_tokens,
            block_tokens=block_pages * page_tokens,
            reads_per_block=True,
        ),
        name="paged_prefill",
        interpret=interpret,
    )
    return _by_token(output, batch, group_size, query_tokens)[:, :new_tokens]


def _kernel(
    visits_ref,  # SMEM [5, programs]
    tables_ref,  # SMEM [batch, pages_per_sequence]
    begins_ref,  # SMEM [programs], position of the first query
    ends_ref,  # SMEM [programs], end of what its queries see
    query_ref,  # VMEM [1, 1, rows, head_dim], rotated; rows are [group, token]
    cos_ref,  # VMEM [pages_per_sequence, head_dim]
    sin_ref,  # VMEM [pages_per_sequence, head_dim]
    pool_ref,  # HBM [slots, layers, kv_heads, 2, page_tokens, head_dim]
    output_ref,  # VMEM [1, 1, rows, head_dim]
    buffers,  # VMEM [2, 2, block_pages, page_tokens, head_dim]
    semaphores,  # one a buffer
    *state,  # of [rows]
    layer: int,
    window: int | None,
    soft_cap: float | None,
    group_size: int,
    programs_per_sequence: int,
):
    _, _, block_pages, page_tokens, head_dim = buffers.shape
    block_tokens = block_pages * page_tokens
    head, program = pl.program_id(0), pl.program_id(1)
    begin, end = begins_ref[program], ends_ref[program]
    rows = query_ref.shape[2]
    query_tokens = rows // group_size
    clear(state)

    def make_copy(program, page, buffer, place):
        slot = tables_ref[program // programs_per_sequence, page]
        return pltpu.make_async_copy(
            pool_ref.at[slot, layer, head],
            buffers.at[buffer, :, place],
            semaphores.at[buffer],
        )

    def compute(first_page, buffer):
        zero_values_from(end, first_page, buffers.at[buffer, 1])
        rotated = []
        for place in range(block_pages):
            key = buffers[buffer, 0, place].astype(jnp.float32)
            page = jnp.minimum(first_page + place, cos_ref.shape[0] - 1)
            key = rotate_by_pages(key, swap_halves(key), cos_ref, sin_ref, page)
            rotated.append(key.astype(buffers.dtype))
        key = jnp.concatenate(rotated)
        score = cap_scores(dot(query_ref[0], key[None], over=2), soft_cap)

        token = first_page * page_tokens
        shape = (1, query_tokens, block_tokens)
        position = begin + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        token += jax.lax.broadcasted_iota(jnp.int32, shape, 2)
        visible = token <= jnp.minimum(position, end - 1)
        if window is not None:
            visible &= token > position - window
        score = score.reshape(-1, query_tokens, block_tokens)
        score = jnp.where(visible, score, MASKED).reshape(1, rows, block_tokens)
        add_block(state, score, buffers[buffer, 1].reshape(1, block_tokens, head_dim))

    visit_blocks(visits_ref, program, make_copy, compute, block_pages=block_pages)
    output_ref[0, 0] = finish(state).astype(output_ref.dtype)


def _query_tokens(new_tokens, group_size, blocks):
    """Tokens of a program; with the query heads of one kv head they fill its rows."""
    tokens = (blocks.query_rows or QUERY_ROWS) // group_size
    tokens = max(ROW_TILE, tokens // ROW_TILE * ROW_TILE)
    return min(tokens, pl.cdiv(new_tokens, ROW_TILE) * ROW_TILE)


def _rotated(query, starts, lengths, rope):
    """R(position) query, scaled, in the dtype of `query`; zeros for padding."""
    position = starts[:, None] + jnp.arange(query.shape[1], dtype=jnp.int32)
    page, offset = position // rope.page_tokens, position % rope.page_tokens
    x = query.astype(jnp.float32) * query.shape[-1] ** -0.5
    x = rotate(x, rope.page_cos[page][:, :, None], rope.page_sin[page][:, :, None])
    x = rotate(
        x, rope.offset_cos[offset][:, :, None], rope.offset_sin[offset][:, :, None]
    )
    is_new = (position < lengths[:, None])[:, :, None, None]
    return jnp.where(is_new, x, 0).astype(query.dtype)


def _by_program(query, kv_heads, query_tokens):
    """[kv_heads, batch * programs, group * query_tokens, head_dim]."""
    batch, new_tokens, heads, head_dim = query.shape
    programs = pl.cdiv(new_tokens, query_tokens)
    padding = programs * query_tokens - new_tokens
    query = jnp.pad(query, ((0, 0), (0, padding), (0, 0), (0, 0)))
    group_size = heads // kv_heads
    split = (batch, programs, query_tokens, kv_heads, group_size, head_dim)
    query = query.reshape(split).transpose(3, 0, 1, 4, 2, 5)
    return query.reshape(
        kv_heads, batch * programs, group_size * query_tokens, head_dim
    )


def _by_token(output, batch, group_size, query_tokens):
    """The inverse of `_by_program`, padding included."""
    kv_heads, _, _, head_dim = output.shape
    split = (kv_heads, batch, -1, group_size, query_tokens, head_dim)
    output = output.reshape(split).transpose(1, 2, 4, 0, 3, 5)
    return output.reshape(batch, -1, kv_heads * group_size, head_dim)
