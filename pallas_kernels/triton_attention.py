"""Paged attention for CUDA, through the Triton backend of Pallas.

Knows one kernel: rows of queries of one kv head over a part of the pages of one
sequence. A decode has the query heads of a group as its rows, a prefill the heads of
many tokens.

Positions enter in one of two ways. Few rows are turned back by whole pages, once per
page, and no key is touched: pages go from global to shared memory to the tensor cores.
For many rows the keys are turned to absolute positions once, by a pass before.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.backends import DEFAULT_BLOCKS, Blocks, require
from pallas_kernels.costs import prefill_cost
from pallas_kernels.rope import RopeTables
from pallas_kernels.split_context import count_splits, merge_splits
from pallas_kernels.triton_kernels import attend, last_first, turn_page

# Rows of queries per kv head above which a pass that turns the keys pays; on an H200,
# 8K tokens of history: 58 us against 83 for 64 rows, 89 against 83 for 128.
_FEW_ROWS = 64


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
    """`decode_attention` by flash decoding: small batches split their contexts."""
    starts = jnp.maximum(lengths - 1, 0)
    options = {"layer": layer, "window": window, "soft_cap": soft_cap}
    options |= {"blocks": blocks, "interpret": interpret}
    return prefill(query[:, None], pool, page_tables, starts, lengths, rope, **options)[
        :, 0
    ]


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
    """`prefill_attention` by flash attention; a row block holds whole groups."""
    batch, new_tokens, heads, head_dim = query.shape
    kv_heads, page_tokens = pool.shape[2], rope.page_tokens
    _require_supported(query, pool)
    num_rows = new_tokens * heads // kv_heads
    plan = _plan(blocks, num_rows, pool)
    row_block, tile, turns_keys = plan.row_block, plan.tile, plan.turns_keys
    row_blocks = pl.cdiv(num_rows, row_block)
    reach = page_tables.shape[1] * page_tokens
    splits = blocks.splits or count_splits(batch * kv_heads * row_blocks, reach)
    keys = (
        turn_keys(pool, page_tables, lengths, rope, layer=layer, interpret=interpret)
        if turns_keys
        else pool
    )
    kernel = functools.partial(
        attend,
        turns_keys=turns_keys,
        row_block=row_block,
        layer=layer,
        tile=tile,
        splits=splits,
        window=window,
        soft_cap=soft_cap,
    )
    out_dtype = query.dtype if splits == 1 else jnp.float32
    shape = (splits, batch, kv_heads, row_blocks * row_block)
    out_block = (None, None, None, row_block)

    def place(block, head, split):
        return split, head // kv_heads, head % kv_heads, last_first(block, row_blocks)

    out, log_sum = pl.pallas_call(
        kernel,
        grid=(row_blocks, batch * kv_heads, splits),
        in_specs=[pl.BlockSpec()] * 10,
        out_specs=[
            pl.BlockSpec((*out_block, head_dim), lambda *index: (*place(*index), 0)),
            pl.BlockSpec(out_block, place),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((*shape, head_dim), out_dtype),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ],
        compiler_params=pltriton.CompilerParams(
            num_warps=plan.num_warps, num_stages=plan.num_stages
        ),
        cost_estimate=prefill_cost(
            query,
            pool,
            page_tables,
            query_tokens=pl.cdiv(row_block * kv_heads, heads),
            block_tokens=tile,
            reads_per_block=False,  # blocks that run side by side share the L2 cache
        ),
        interpret=interpret,
        name="paged_attention",
    )(
        query,
        keys,
        pool,
        page_tables,
        starts,
        lengths,
        rope.offset_cos,
        rope.offset_sin,
        rope.page_cos,
        rope.page_sin,
    )
    rows = merge_splits(out, log_sum)[:, :, :num_rows].astype(query.dtype)
    rows = rows.reshape(batch, kv_heads, new_tokens, -1, head_dim)
    return jnp.moveaxis(rows, 1, 2).reshape(query.shape)


def turn_keys(
    pool: Shaped[Array, "slots layers kv_heads 2 page_tokens head_dim"],
    page_tables: Int[Array, "batch pages_per_sequence"],
    lengths: Int[Array, " batch"],
    rope: RopeTables,
    *,
    layer: int,
    interpret: bool = False,
) -> Float[Array, "batch pages_per_sequence kv_heads page_tokens head_dim"]:
    """The keys of each sequence at absolute positions, page by page.

    Pages past a length are not written.
    """
    batch, width = page_tables.shape
    _, _, kv_heads, _, page_tokens, head_dim = pool.shape
    shape = (batch, width, kv_heads, page_tokens, head_dim)
    return pl.pallas_call(
        functools.partial(turn_page, layer=layer),
        grid=(width, kv_heads, batch),
        in_specs=[pl.BlockSpec()] * 5,
        out_specs=pl.BlockSpec(
            (None, None, None, page_tokens, head_dim),
            lambda page, head, sequence: (sequence, page, head, 0, 0),
        ),
        out_shape=jax.ShapeDtypeStruct(shape, pool.dtype),
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="turn_keys",
    )(pool, page_tables, lengths, rope.page_cos, rope.page_sin)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Sizes of one call; see `Blocks`."""

    row_block: int
    tile: int
    turns_keys: bool
    num_warps: int
    num_stages: int


def _plan(blocks: Blocks, num_rows: int, pool: Array) -> _Plan:
    """What `blocks` leaves open, by measurements on an H200 and by spills."""
    page_tokens, head_dim = pool.shape[4:]
    if pool.dtype == jnp.float32:  # more registers a value, no tensor cores
        rows, tile, stages = 32, 32, 3
    elif num_rows <= 16:
        # 5 stages against 3: 3.7 TB/s against 3.4, 4.1 against 3.7 for 64 sequences.
        rows, tile, stages = 16, 64, 5
    elif num_rows <= _FEW_ROWS:
        rows, tile, stages = 64, 32, 3
    elif page_tokens < 128 or head_dim > 128:
        rows, tile, stages = 64, 64, 3
    else:  # 310 TFLOP/s at 8K tokens, against 284 in blocks of 64 by 64
        rows, tile, stages = 128, 128, 3
    turns_keys = blocks.turns_keys
    rows = min(rows, max(16, pl.next_power_of_2(num_rows)))
    return _Plan(
        row_block=blocks.query_rows or rows,
        tile=min(page_tokens, blocks.context_tokens or tile),
        turns_keys=num_rows > _FEW_ROWS if turns_keys is None else turns_keys,
        num_warps=blocks.num_warps or (8 if rows > 64 or head_dim > 128 else 4),
        num_stages=blocks.num_stages or stages,
    )


def _require_supported(query, pool):
    sizes = ("page_tokens", pool.shape[4], 16), ("head_dim", pool.shape[5], 32)
    for name, size, least in sizes:
        require(
            size >= least and size & (size - 1) == 0,
            "triton",
            f"{name}={size}, which is not a power of 2 of at least {least}",
        )
    require(
        pool.dtype == query.dtype,
        "triton",
        f"a pool of {pool.dtype} with queries of {query.dtype}",
    )
