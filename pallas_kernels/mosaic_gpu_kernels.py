"""The kernel body of `mosaic_gpu_attention`, in what Pallas lowers to Mosaic GPU.

Knows references, warpgroups and their matrices. Does not know how sizes are chosen or
how tiles arrive.
"""

# To pyright the decorators and names of Mosaic GPU are untyped or private.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportPrivateImportUsage=false

import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.mosaic_gpu_pages import WARPGROUP_ROWS, Plan, Tiles

LOG2_E = 1.4426950408889634
# Finite, so that a row that has seen no token yet computes no inf - inf.
NO_SCORE = -1e30
_MATRIX = plgpu.Layout.WGMMA
_PER_ROW, _PER_COLUMN = _MATRIX.reduce(1), _MATRIX.reduce(0)
# Registers of a thread that computes and of one that only issues copies: two
# warpgroups of the first kind and one of the second fill a multiprocessor.
_COMPUTE_REGISTERS, _LOADER_REGISTERS = 232, 40


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """The rows of one warpgroup.

    Attributes:
        warpgroup: its index in the program.
        query: where they are in shared memory, or both halves of them in registers.
        limits: tokens that each row sees.
        clear: steps, from the first one on, whose tokens all rows see.
    """

    warpgroup: Array | int
    query: Any
    limits: Array
    clear: Array


def attend(
    rows_ref,  # [batch, kv_heads, rows, head_dim]
    keys_ref,  # the pool, or [batch, width, kv_heads, page_tokens, head_dim]
    pool_ref,  # [slots, layers, kv_heads, 2, page_tokens, head_dim]
    tables_ref,  # [batch, width]
    starts_ref,  # [batch]
    lengths_ref,  # [batch]
    page_cos_ref,  # [num_pages, head_dim / 2]
    page_sin_ref,  # [num_pages, head_dim / 2]
    layer_ref,  # [1], so that all layers of a model share one compiled kernel
    out_ref,  # [splits, batch, kv_heads, rows, head_dim]
    log_sum_ref,  # [splits, batch, kv_heads, rows]
    *,
    plan: Plan,
    group_size: int,
    interpret: bool,
    **scratch,
):
    """Rows of one kv head of one sequence over one part of its context."""
    shared = SimpleNamespace(**scratch)
    slots, _, kv_heads, _, page_tokens, head_dim = pool_ref.shape
    width, split = tables_ref.shape[1], lax.axis_index("split")
    sequence = lax.div(lax.axis_index("head"), kv_heads)
    kv_head = lax.rem(lax.axis_index("head"), kv_heads)
    last_block = rows_ref.shape[2] // plan.row_block - 1
    # The longest contexts first, so that the last are short.
    first_row = (last_block - lax.axis_index("row_block")) * plan.row_block
    start, layer = starts_ref[sequence], layer_ref[0]
    length = jnp.minimum(lengths_ref[sequence], width * page_tokens)

    def sees(row):
        return jnp.minimum(start + lax.div(row, group_size) + 1, length)

    is_padding = start + lax.div(first_row, group_size) >= length
    end = jnp.where(is_padding, 0, sees(first_row + plan.row_block - 1))
    end_tile = _cdiv(end, plan.tile)
    share = _cdiv(end_tile, out_ref.shape[0])
    first = jnp.minimum(split * share, end_tile)

    def keys_of(page, slot):
        if plan.turns_keys:
            return keys_ref.at[sequence, jnp.minimum(page, width - 1), kv_head]
        return keys_ref.at[slot, layer, kv_head, 0]

    def slot_of(page):
        """Inside the pool whatever the table says."""
        return jnp.clip(
            tables_ref[sequence, jnp.minimum(page, width - 1)], 0, slots - 1
        )

    tiles = Tiles(
        plan=plan,
        shared=shared,
        first=first,
        count=jnp.minimum(share, end_tile - first),
        page_tokens=page_tokens,
        slot_of=slot_of,
        keys_of=keys_of,
        values_of=lambda page, slot: pool_ref.at[slot, layer, kv_head, 1],
        angles_of=lambda page: (page_cos_ref.at[page], page_sin_ref.at[page]),
    )

    def compute(warpgroup):
        own_row = first_row + warpgroup * WARPGROUP_ROWS
        place = sequence, kv_head, pl.ds(own_row, WARPGROUP_ROWS)
        row = plgpu.broadcasted_iota(jnp.int32, (WARPGROUP_ROWS,), 0, layout=_PER_ROW)
        clear = lax.div(sees(own_row), plan.tile) - first
        rows = _Rows(
            warpgroup=warpgroup,
            query=_query(rows_ref.at[place], shared, warpgroup, plan),
            limits=sees(own_row + row),
            clear=jnp.clip(clear, 0, tiles.count),
        )
        out, log_sum = _softmax_rows(rows, tiles, length, head_dim, interpret)
        out_ref.at[split, *place][...] = out.astype(out_ref.dtype)
        log_sum_ref.at[split, *place][...] = log_sum

    if not plan.has_loader:
        tiles.load_first()
        compute(0)
        return
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < plan.warpgroups)
    def _():
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        compute(warpgroup)

    @pl.when(warpgroup == plan.warpgroups)
    def _():
        plgpu.set_max_registers(_LOADER_REGISTERS, action="decrease")
        tiles.load_first()
        tiles.load_rest()


def _softmax_rows(rows: _Rows, tiles: Tiles, length, head_dim: int, interpret: bool):
    """Softmax of the rows over the tiles, and base-2 logarithms of their sums."""
    shape = (WARPGROUP_ROWS, head_dim)
    state = (
        plgpu.layout_cast(jnp.full(shape[:1], NO_SCORE, jnp.float32), _PER_ROW),
        plgpu.layout_cast(jnp.zeros(shape[:1], jnp.float32), _PER_ROW),
        plgpu.layout_cast(jnp.zeros(shape, jnp.float32), _MATRIX),
    )
    clear, masked = (
        functools.partial(_attend_tile, rows, tiles, end, interpret)
        for end in (None, length)
    )
    state = lax.fori_loop(0, rows.clear, clear, state)
    peak, total, weighted = lax.fori_loop(rows.clear, tiles.count, masked, state)
    divisor = jnp.where(total == 0, 1.0, total)
    log_sum = jnp.where(total == 0, NO_SCORE, peak + jnp.log(divisor) * LOG2_E)
    return weighted / lax.broadcast_in_dim(divisor, shape, [0]), log_sum


def _attend_tile(rows: _Rows, tiles: Tiles, length, interpret: bool, step, state):
    """One step of the online softmax; a `length` means that the tile needs a mask."""
    peak, total, weighted = state
    plan, shared = tiles.plan, tiles.shared
    stage, later = lax.rem(step, plan.stages), step + plan.stages
    first_token = (tiles.first + step) * plan.tile
    if not plan.has_loader:
        later_places = tiles.places(later)  # read early, used after the products

    def release(free, load):
        """Lets go of a buffer; without a loader, also fills it again."""
        if plan.has_loader:
            plgpu.barrier_arrive(free.at[stage])
        else:
            plgpu.commit_smem()  # waits for all four warps
            pl.when(later < tiles.count)(lambda: load(later, later_places))

    plgpu.barrier_wait(shared.keys_ready.at[stage])
    query = _turned_back(rows.query, shared, stage, plan)
    score = _product(query, shared.keys.at[stage], interpret)
    release(shared.keys_free, tiles.load_keys)
    if length is not None:
        token = first_token + plgpu.broadcasted_iota(
            jnp.int32, score.shape, 1, layout=_MATRIX
        )
        visible = token < lax.broadcast_in_dim(rows.limits, score.shape, [0])
        score = jnp.where(visible, score, -jnp.inf)
    new_peak = jnp.maximum(peak, score.max(axis=1))
    weight = jnp.exp2(score - lax.broadcast_in_dim(new_peak, score.shape, [0]))
    rescale = jnp.exp2(peak - new_peak)
    total = total * rescale + weight.sum(axis=1)
    weighted *= lax.broadcast_in_dim(rescale, weighted.shape, [0])
    plgpu.barrier_wait(shared.values_ready.at[stage])
    values = shared.values.at[stage]
    if length is not None:
        _clear_end(values, length - first_token, rows.warpgroup, shared, plan)
    weighted = _accumulate(weighted, weight.astype(values.dtype), values, interpret)
    release(shared.values_free, tiles.load_values)
    return new_peak, total, weighted


def _cdiv(x, y: int):
    return lax.div(x + (y - 1), y)


def _query(source, shared, warpgroup, plan):
    """Rows in shared memory, or both halves of them in registers."""
    if plan.turns_keys:
        target, ready = shared.rows.at[warpgroup], shared.rows_ready.at[warpgroup]
        plgpu.copy_gmem_to_smem(source, target, ready)
        plgpu.barrier_wait(ready)
        return target
    half = source.shape[-1] // 2
    return [
        plgpu.load(source.at[:, pl.ds(first, half)], layout=_MATRIX, optimized=False)
        for first in (0, half)
    ]


def _turned_back(query, shared, stage, plan):
    """What meets the keys of a tile: rows turned back by their page; see `rope`."""
    if plan.turns_keys:
        return [query]
    first, second = query
    cos, sin = (
        lax.broadcast_in_dim(
            plgpu.load(angles.at[stage], layout=_PER_COLUMN, optimized=False),
            first.shape,
            [1],
        )
        for angles in (shared.cos, shared.sin)
    )
    turned = first * cos + second * sin, second * cos - first * sin
    return [half.astype(jnp.bfloat16) for half in turned]


def _product(parts, keys, interpret: bool):
    """parts @ keys.T, where `parts` stand side by side.

    The interpreter knows no product with an operand in registers.
    """
    width = keys.shape[-1] // len(parts)
    columns = [pl.ds(index * width, width) for index in range(len(parts))]
    if interpret:
        return sum(
            jnp.dot(part[...], keys[:, column].T, preferred_element_type=jnp.float32)
            for part, column in zip(parts, columns, strict=True)
        )

    def multiply(sums):
        for part, column in zip(parts, columns, strict=True):
            plgpu.wgmma(sums, part, keys.at[:, column].transpose((1, 0)))
        return sums[...]

    shape = (WARPGROUP_ROWS, keys.shape[0])
    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def _accumulate(weighted, weight, values, interpret: bool):
    """weighted + weight @ values."""
    if interpret:
        product = jnp.dot(weight, values[...], preferred_element_type=jnp.float32)
        return weighted + product

    def multiply(sums):
        plgpu.wgmma(sums, weight, values)

    return pl.run_state(multiply)(plgpu.ACC.init(weighted))


def _clear_end(values, num_rows, warpgroup, shared, plan):
    """Zeros from row `num_rows` on, for all that share the tile: 0 * NaN is NaN."""

    def clear():
        for first in range(0, values.shape[0], WARPGROUP_ROWS):
            part = values.at[pl.ds(first, WARPGROUP_ROWS)]
            stored = plgpu.load(part, layout=_MATRIX)
            row = first + plgpu.broadcasted_iota(
                jnp.int32, stored.shape, 0, layout=_MATRIX
            )
            part[...] = jnp.where(row < num_rows, stored, jnp.zeros_like(stored))
        plgpu.commit_smem()

    @pl.when(num_rows < values.shape[0])
    def _():
        pl.when(warpgroup == 0)(clear)
        if plan.has_loader:
            plgpu.barrier_arrive(shared.cleared)
            plgpu.barrier_wait(shared.cleared)
