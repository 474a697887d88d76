"""Paged attention for CUDA, through the Triton backend of Pallas.

Knows one kernel: rows of queries of one kv head over a part of the pages of one
sequence. A decode has the query heads of a group as its rows, a prefill the heads of
many tokens.

Positions enter in one of two ways. Few rows are turned back by whole pages, once per
page, and no key is touched: pages go from global to shared memory to the tensor cores.
For many rows the keys are turned to absolute positions once, by a pass before.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.backends import DEFAULT_BLOCKS, Blocks, require
from pallas_kernels.costs import prefill_cost
from pallas_kernels.rope import RopeTables

_LOG2_E = 1.4426950408889634
# Finite, so that a row that has seen no token yet computes no inf - inf.
_NO_SCORE = -1e30
# Programs that fill the 132 multiprocessors of an H200: a decode of 16 sequences of 8K
# tokens and 8 kv heads reads 3.5 TB/s unsplit, 3.7 in 2 parts, 3.5 in 4.
_ENOUGH_PROGRAMS = 256
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
    """`decode_attention`: flash decoding, its context split where the batch is small."""
    starts = jnp.maximum(lengths - 1, 0)
    options = {"layer": layer, "window": window, "soft_cap": soft_cap}
    options |= {"blocks": blocks, "interpret": interpret}
    return prefill(
        query[:, None], pool, page_tables, starts, lengths, rope, **options
    )[:, 0]


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
    """`prefill_attention`: flash attention whose row blocks hold all heads of a group."""
    batch, new_tokens, heads, head_dim = query.shape
    kv_heads, page_tokens = pool.shape[2], rope.page_tokens
    _require_supported(query, pool)
    num_rows = new_tokens * heads // kv_heads
    blocks = _fill_in(blocks, num_rows, pool)
    row_block, turns_keys = blocks.query_rows, blocks.turns_keys
    tile = min(page_tokens, blocks.context_tokens)
    row_blocks = pl.cdiv(num_rows, row_block)
    reach = page_tables.shape[1] * page_tokens
    splits = blocks.splits or _splits(batch * kv_heads * row_blocks, reach)
    keys = (
        turn_keys(pool, page_tables, lengths, rope, layer=layer, interpret=interpret)
        if turns_keys
        else pool
    )
    kernel = functools.partial(
        _attend,
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
        return split, head // kv_heads, head % kv_heads, _last_first(block, row_blocks)

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
            num_warps=blocks.num_warps, num_stages=blocks.num_stages
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
        functools.partial(_turn_page, layer=layer),
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


def _turn_page(pool_ref, tables_ref, lengths_ref, cos_ref, sin_ref, out_ref, *, layer):
    page, head, sequence = (pl.program_id(axis) for axis in range(3))
    page_tokens, head_dim = out_ref.shape
    half = head_dim // 2

    @pl.when(page * page_tokens < lengths_ref[sequence])
    def _():
        slot = _slot(tables_ref, sequence, page, pool_ref)
        first = pool_ref[slot, layer, head, 0, :, pl.ds(0, half)].astype(jnp.float32)
        second = pool_ref[slot, layer, head, 0, :, pl.ds(half, half)]
        second = second.astype(jnp.float32)
        cos, sin = cos_ref[page, :][None], sin_ref[page, :][None]
        turned = first * cos - second * sin
        out_ref[:, pl.ds(0, half)] = turned.astype(out_ref.dtype)
        turned = second * cos + first * sin
        out_ref[:, pl.ds(half, half)] = turned.astype(out_ref.dtype)


def _slot(tables_ref, sequence, page, pool_ref):
    """The slot of a page, inside the pool whatever the table says."""
    slot = tables_ref[sequence, jnp.minimum(page, tables_ref.shape[1] - 1)]
    return jnp.clip(slot, 0, pool_ref.shape[0] - 1)


def _attend(
    query_ref,
    keys_ref,
    pool_ref,
    tables_ref,
    starts_ref,
    lengths_ref,
    offset_cos_ref,
    offset_sin_ref,
    page_cos_ref,
    page_sin_ref,
    out_ref,
    log_sum_ref,
    *,
    turns_keys: bool,
    row_block: int,
    layer: int,
    tile: int,
    splits: int,
    window: int | None,
    soft_cap: float | None,
):
    """Rows of one kv head of one sequence over one part of its context."""
    _, new_tokens, heads, head_dim = query_ref.shape
    kv_heads, page_tokens = pool_ref.shape[2], pool_ref.shape[4]
    group_size, half, dtype = heads // kv_heads, head_dim // 2, pool_ref.dtype
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    dot = functools.partial(
        jnp.dot, precision=precision, preferred_element_type=jnp.float32
    )
    first_half, second_half = pl.ds(0, half), pl.ds(half, half)
    sequence, kv_head = pl.program_id(1) // kv_heads, pl.program_id(1) % kv_heads
    split = pl.program_id(2)
    first_row = _last_first(pl.program_id(0), pl.num_programs(0)) * row_block
    row = first_row + jnp.arange(row_block)
    token = jnp.minimum(row // group_size, new_tokens - 1)
    head = kv_head * group_size + row % group_size
    start, length = starts_ref[sequence], lengths_ref[sequence]
    position = start + token
    first_position = start + first_row // group_size
    last_position = start + (first_row + row_block - 1) // group_size

    query_first, query_second = _turn(
        query_ref[sequence, token, head, first_half].astype(jnp.float32),
        query_ref[sequence, token, head, second_half].astype(jnp.float32),
        offset_cos_ref[position % page_tokens, :],
        offset_sin_ref[position % page_tokens, :],
    )
    page_of = jnp.minimum(position // page_tokens, page_cos_ref.shape[0] - 1)
    query_first, query_second = _turn(
        query_first, query_second, page_cos_ref[page_of, :], page_sin_ref[page_of, :]
    )
    if turns_keys:
        query_first, query_second = query_first.astype(dtype), query_second.astype(dtype)
    scale = head_dim**-0.5 * (_LOG2_E if soft_cap is None else 1)

    # The tiles of context that this program sees: [begin, end_tile), and those of
    # [begin, clear_end) without a mask.
    end = jnp.where(
        first_position < length, jnp.minimum(length, last_position + 1), 0
    )
    begin = 0
    if window is not None:
        begin = jnp.maximum(first_position - window + 1, 0) // tile
    share = pl.cdiv(pl.cdiv(end, tile) - begin, splits)
    begin = begin + split * share
    end_tile = jnp.maximum(jnp.minimum(begin + share, pl.cdiv(end, tile)), begin)
    clear_end = jnp.minimum(length, first_position + 1) // tile
    clear_end = begin if window is not None else jnp.clip(clear_end, begin, end_tile)

    def attend_tile(is_clear, index, state):
        peak, total, first_sum, second_sum = state
        page = index * tile // page_tokens
        inside = pl.ds(index * tile % page_tokens, tile)
        slot = _slot(tables_ref, sequence, page, pool_ref)
        if turns_keys:
            page = jnp.minimum(page, keys_ref.shape[1] - 1)
            key_first = keys_ref[sequence, page, kv_head, inside, first_half]
            key_second = keys_ref[sequence, page, kv_head, inside, second_half]
            back_first, back_second = query_first, query_second
        else:
            key_first = keys_ref[slot, layer, kv_head, 0, inside, first_half]
            key_second = keys_ref[slot, layer, kv_head, 0, inside, second_half]
            page = jnp.minimum(page, page_cos_ref.shape[0] - 1)
            back_first, back_second = _turn(
                query_first,
                query_second,
                page_cos_ref[page, :][None],
                -page_sin_ref[page, :][None],
            )
        value_first = pool_ref[slot, layer, kv_head, 1, inside, first_half]
        value_second = pool_ref[slot, layer, kv_head, 1, inside, second_half]
        score = dot(back_first.astype(dtype), key_first.T)
        score = (score + dot(back_second.astype(dtype), key_second.T)) * scale
        if soft_cap is not None:
            score = (soft_cap * _LOG2_E) * jnp.tanh(score / soft_cap)
        if not is_clear:
            context = index * tile + jnp.arange(tile)
            in_context = context < length
            visible = (context[None] <= position[:, None]) & in_context[None]
            if window is not None:
                visible &= context[None] > position[:, None] - window
            score = jnp.where(visible, score, -jnp.inf)
            # 0 * NaN is NaN
            value_first = jnp.where(in_context[:, None], value_first, 0)
            value_second = jnp.where(in_context[:, None], value_second, 0)
        new_peak = jnp.maximum(peak, score.max(axis=1))
        weight = jnp.exp2(score - new_peak[:, None])
        rescale = jnp.exp2(peak - new_peak)
        total = total * rescale + weight.sum(axis=1)
        weight = weight.astype(dtype)
        first_sum = first_sum * rescale[:, None] + dot(weight, value_first)
        second_sum = second_sum * rescale[:, None] + dot(weight, value_second)
        return new_peak, total, first_sum, second_sum

    state = (
        jnp.full((row_block,), _NO_SCORE, jnp.float32),
        jnp.zeros((row_block,), jnp.float32),
        jnp.zeros((row_block, half), jnp.float32),
        jnp.zeros((row_block, half), jnp.float32),
    )
    clear, masked = (functools.partial(attend_tile, clear) for clear in (True, False))
    state = jax.lax.fori_loop(begin, clear_end, clear, state)
    state = jax.lax.fori_loop(clear_end, end_tile, masked, state)
    peak, total, first_sum, second_sum = state
    divisor = jnp.where(total == 0, 1, total)
    for part, total_sum in ((first_half, first_sum), (second_half, second_sum)):
        out_ref[:, part] = (total_sum / divisor[:, None]).astype(out_ref.dtype)
    log_sum_ref[...] = jnp.where(total == 0, _NO_SCORE, peak + jnp.log2(divisor))


def _last_first(block, num_blocks):
    """Row blocks in reverse: the longest contexts first, so that the last are short."""
    return num_blocks - 1 - block


def _turn(first, second, cos, sin):
    """Both halves of rotated rows; see `rope.rotate`."""
    return first * cos - second * sin, second * cos + first * sin


def merge_splits(
    out: Float[Array, "splits batch kv_heads rows head_dim"],
    log_sum: Float[Array, "splits batch kv_heads rows"],
) -> Float[Array, "batch kv_heads rows head_dim"]:
    """The softmax over a whole context from those over its parts (flash decoding).

    Args:
        log_sum: base-2 logarithm of each part's sum of weights; a part without tokens
            has a large negative one.
    """
    if out.shape[0] == 1:
        return out[0]
    weight = jnp.exp2(log_sum - log_sum.max(axis=0))
    weight = weight / weight.sum(axis=0)
    return jnp.sum(out * weight[..., None], axis=0)


def _fill_in(blocks: Blocks, num_rows: int, pool: Array) -> Blocks:
    """`blocks` with what it leaves open, by measurements on an H200 and by spills."""
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
    default = Blocks(
        query_rows=min(rows, max(16, pl.next_power_of_2(num_rows))),
        context_tokens=tile,
        num_warps=8 if rows > 64 or head_dim > 128 else 4,
        num_stages=stages,
        turns_keys=num_rows > _FEW_ROWS,
    )
    given = {name: size for name, size in vars(blocks).items() if size is not None}
    return replace(default, **given)


def _splits(programs: int, context_tokens: int) -> int:
    """Parts per context that fill the chip, none below 256 tokens."""
    wanted = pl.cdiv(_ENOUGH_PROGRAMS, programs)
    return max(1, min(wanted, context_tokens // 256))


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
