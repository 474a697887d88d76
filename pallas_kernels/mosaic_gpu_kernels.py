"""The kernel body of `mosaic_gpu_attention`, in what Pallas lowers to Mosaic GPU.

Knows references, barriers and warpgroups. Does not know how sizes are chosen.
"""

import functools
from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

LOG2_E = 1.4426950408889634
# Finite, so that a row that has seen no token yet computes no inf - inf.
NO_SCORE = -1e30
# A tensor core instruction of one warpgroup is so many rows high.
WARPGROUP_ROWS = 64
_MATRIX = plgpu.Layout.WGMMA
_PER_ROW, _PER_COLUMN = _MATRIX.reduce(1), _MATRIX.reduce(0)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of one call; see `Blocks`.

    Attributes:
        warpgroups: of `WARPGROUP_ROWS` rows each; they share the tiles of context.
        tile_copies: pages, or the one part of a page, that make up a tile.
    """

    warpgroups: int
    tile: int
    tile_copies: int
    turns_keys: bool
    stages: int

    @property
    def row_block(self) -> int:
        return self.warpgroups * WARPGROUP_ROWS

    @property
    def has_loader(self) -> bool:
        """Whether a warpgroup of its own issues the copies."""
        return self.warpgroups > 1

    @property
    def num_threads(self) -> int:
        return self.warpgroups + self.has_loader


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
    kv_heads, page_tokens = pool_ref.shape[2], pool_ref.shape[4]
    head, split = lax.axis_index("head"), lax.axis_index("split")
    sequence, kv_head = lax.div(head, kv_heads), lax.rem(head, kv_heads)
    row_blocks = rows_ref.shape[2] // plan.row_block
    # The longest contexts first, so that the last are short.
    first_row = (row_blocks - 1 - lax.axis_index("row_block")) * plan.row_block
    start, layer = starts_ref[sequence], layer_ref[0]
    length = jnp.minimum(lengths_ref[sequence], tables_ref.shape[1] * page_tokens)
    first_position = start + lax.div(first_row, group_size)
    last_position = start + lax.div(first_row + plan.row_block - 1, group_size)
    end = jnp.where(first_position < length, jnp.minimum(length, last_position + 1), 0)
    end_tile = _cdiv(end, plan.tile)
    share = _cdiv(end_tile, out_ref.shape[0])
    begin = jnp.minimum(split * share, end_tile)
    tiles = jnp.minimum(share, end_tile - begin)

    def pages_of(index):
        """(page, slot) of each copy of a tile."""
        pages = [
            jnp.minimum(
                lax.div(index * plan.tile, page_tokens) + part, tables_ref.shape[1] - 1
            )
            for part in range(plan.tile_copies)
        ]
        slots = [tables_ref[sequence, page] for page in pages]
        return [
            (page, jnp.clip(slot, 0, pool_ref.shape[0] - 1))
            for page, slot in zip(pages, slots, strict=True)
        ]

    height = plan.tile // plan.tile_copies

    def copy(places, index, source, destination, ready):
        inside = slice(None)
        if height < page_tokens:
            offset = lax.rem(index * height, page_tokens)
            inside = pl.ds(pl.multiple_of(offset, height), height)
        for part, place in enumerate(places):
            target = destination.at[pl.ds(part * height, height)]
            plgpu.copy_gmem_to_smem(source(*place).at[inside], target, ready)

    def load_keys(places, index, stage):
        ready = shared.keys_ready.at[stage]

        def source(page, slot):
            if plan.turns_keys:
                return keys_ref.at[sequence, page, kv_head]
            return keys_ref.at[slot, layer, kv_head, 0]

        copy(places, index, source, shared.keys.at[stage], ready)
        if not plan.turns_keys:
            page = places[0][0]
            for table, row in (page_cos_ref, shared.cos), (page_sin_ref, shared.sin):
                plgpu.copy_gmem_to_smem(table.at[page], row.at[stage], ready)

    def load_values(places, index, stage):
        def source(page, slot):
            return pool_ref.at[slot, layer, kv_head, 1]

        ready = shared.values_ready.at[stage]
        copy(places, index, source, shared.values.at[stage], ready)

    def load_first():
        for stage in range(plan.stages):

            @pl.when(stage < tiles)
            def _(stage=stage):
                places = pages_of(begin + stage)
                load_keys(places, begin + stage, stage)
                load_values(places, begin + stage, stage)

    def compute(warpgroup):
        rows = pl.ds(first_row + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
        source = rows_ref.at[sequence, kv_head, rows]
        query = _query(source, shared, warpgroup, plan)
        row = plgpu.broadcasted_iota(jnp.int32, (WARPGROUP_ROWS,), 0, layout=_PER_ROW)
        first = first_row + warpgroup * WARPGROUP_ROWS
        limit = jnp.minimum(start + lax.div(first + row, group_size) + 1, length)
        first_limit = jnp.minimum(start + lax.div(first, group_size) + 1, length)
        clear = jnp.clip(lax.div(first_limit, plan.tile) - begin, 0, tiles)

        def attend_tile(is_clear, step, state):
            peak, total, weighted = state
            index, stage = begin + step, lax.rem(step, plan.stages)
            if not plan.has_loader:
                later = pages_of(index + plan.stages)
            more = step + plan.stages < tiles
            plgpu.barrier_wait(shared.keys_ready.at[stage])
            score = _product(
                _turned(query, shared, stage, plan), shared.keys.at[stage], interpret
            )
            plgpu.barrier_arrive(shared.keys_free.at[stage])
            if not plan.has_loader:
                plgpu.barrier_wait(shared.keys_free.at[stage])
                pl.when(more)(lambda: load_keys(later, index + plan.stages, stage))
            if not is_clear:
                context = index * plan.tile + plgpu.broadcasted_iota(
                    jnp.int32, score.shape, 1, layout=_MATRIX
                )
                visible = context < lax.broadcast_in_dim(limit, score.shape, [0])
                score = jnp.where(visible, score, -jnp.inf)
            new_peak = jnp.maximum(peak, score.max(axis=1))
            weight = jnp.exp2(score - lax.broadcast_in_dim(new_peak, score.shape, [0]))
            rescale = jnp.exp2(peak - new_peak)
            total = total * rescale + weight.sum(axis=1)
            weighted *= lax.broadcast_in_dim(rescale, weighted.shape, [0])
            weight = weight.astype(pool_ref.dtype)
            plgpu.barrier_wait(shared.values_ready.at[stage])
            values = shared.values.at[stage]
            if not is_clear:
                _clear_rows(values, length - index * plan.tile)
            weighted = _accumulate(weighted, weight, values, interpret)
            plgpu.barrier_arrive(shared.values_free.at[stage])
            if not plan.has_loader:
                plgpu.barrier_wait(shared.values_free.at[stage])
                pl.when(more)(lambda: load_values(later, index + plan.stages, stage))
            return new_peak, total, weighted

        head_dim = pool_ref.shape[5]
        full = (WARPGROUP_ROWS, head_dim)
        state = (
            plgpu.layout_cast(jnp.full(full[:1], NO_SCORE, jnp.float32), _PER_ROW),
            plgpu.layout_cast(jnp.full(full[:1], 0, jnp.float32), _PER_ROW),
            plgpu.layout_cast(jnp.full(full, 0, jnp.float32), _MATRIX),
        )
        state = lax.fori_loop(0, clear, functools.partial(attend_tile, True), state)
        state = lax.fori_loop(
            clear, tiles, functools.partial(attend_tile, False), state
        )
        peak, total, weighted = state
        divisor = jnp.where(total == 0, 1.0, total)
        log_sum = jnp.where(total == 0, NO_SCORE, peak + jnp.log(divisor) * LOG2_E)
        weighted /= lax.broadcast_in_dim(divisor, full, [0])
        place = split, sequence, kv_head, rows
        out_ref.at[place][...] = weighted.astype(out_ref.dtype)
        log_sum_ref.at[place][...] = log_sum

    def load():
        load_first()

        def load_tile(step, _):
            stage = lax.rem(step, plan.stages)
            places = pages_of(begin + step)
            plgpu.barrier_wait(shared.keys_free.at[stage])
            load_keys(places, begin + step, stage)
            plgpu.barrier_wait(shared.values_free.at[stage])
            load_values(places, begin + step, stage)

        lax.fori_loop(plan.stages, tiles, load_tile, None)

    if not plan.has_loader:
        load_first()
        compute(0)
        return
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < plan.warpgroups)
    def _():
        plgpu.set_max_registers(232, action="increase")
        compute(warpgroup)

    @pl.when(warpgroup == plan.warpgroups)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        load()


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


def _turned(query, shared, stage, plan):
    """What meets the keys of a tile: rows turned back by their page; see `rope`."""
    if plan.turns_keys:
        return [query]
    first, second = query
    cos, sin = (
        lax.broadcast_in_dim(
            plgpu.load(table.at[stage], layout=_PER_COLUMN, optimized=False),
            first.shape,
            [1],
        )
        for table in (shared.cos, shared.sin)
    )
    turned = first * cos + second * sin, second * cos - first * sin
    return [half.astype(jnp.bfloat16) for half in turned]


def _product(parts, keys, interpret):
    """parts @ keys.T, where `parts` are side by side."""
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


def _accumulate(weighted, weight, values, interpret):
    """weighted + weight @ values."""
    if interpret:
        return weighted + jnp.dot(
            weight, values[...], preferred_element_type=jnp.float32
        )

    def multiply(sums):
        plgpu.wgmma(sums, weight, values)

    return pl.run_state(multiply)(plgpu.ACC.init(weighted))


def _clear_rows(values, num_rows):
    """Zeros from row `num_rows` on: 0 * NaN is NaN."""

    @pl.when(num_rows < values.shape[0])
    def _():
        for first in range(0, values.shape[0], WARPGROUP_ROWS):
            part = values.at[pl.ds(first, WARPGROUP_ROWS)]
            stored = plgpu.load(part, layout=_MATRIX)
            row = first + plgpu.broadcasted_iota(
                jnp.int32, stored.shape, 0, layout=_MATRIX
            )
            part[...] = jnp.where(row < num_rows, stored, jnp.zeros_like(stored))
        plgpu.commit_smem()
