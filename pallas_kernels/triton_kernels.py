"""The kernel bodies of `triton_attention`, in what Pallas lowers to Triton.

Knows references and tiles. Does not know grids, blocks or how sizes are chosen.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

LOG2_E = 1.4426950408889634
# Finite, so that a row that has seen no token yet computes no inf - inf.
NO_SCORE = -1e30


def attend(
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
    first_row = last_first(pl.program_id(0), pl.num_programs(0)) * row_block
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
        query_first, query_second = (
            query_first.astype(dtype),
            query_second.astype(dtype),
        )
    scale = head_dim**-0.5 * (LOG2_E if soft_cap is None else 1)

    # The tiles of context that this program sees: [begin, end_tile), and those of
    # [begin, clear_end) without a mask.
    end = jnp.where(first_position < length, jnp.minimum(length, last_position + 1), 0)
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
            score = (soft_cap * LOG2_E) * jnp.tanh(score / soft_cap)
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
        jnp.full((row_block,), NO_SCORE, jnp.float32),
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
    log_sum_ref[...] = jnp.where(total == 0, NO_SCORE, peak + jnp.log2(divisor))


def last_first(block, num_blocks):
    """Row blocks in reverse: the longest contexts first, so that the last are short."""
    return num_blocks - 1 - block


def _turn(first, second, cos, sin):
    """Both halves of rotated rows; see `rope.rotate`."""
    return first * cos - second * sin, second * cos + first * sin


def turn_page(
    pool_ref, tables_ref, lengths_ref, cos_ref, sin_ref, out_ref, *, layer: int
):
    """The keys of one page and kv head at absolute positions."""
    page, head, sequence = (pl.program_id(axis) for axis in range(3))
    page_tokens, head_dim = out_ref.shape
    half = head_dim // 2

    @pl.when(page * page_tokens < lengths_ref[sequence])
    def _():
        slot = _slot(tables_ref, sequence, page, pool_ref)
        halves = pl.ds(0, half), pl.ds(half, half)
        keys = [pool_ref[slot, layer, head, 0, :, part] for part in halves]
        first, second = (key.astype(jnp.float32) for key in keys)
        turned = _turn(first, second, cos_ref[page, :][None], sin_ref[page, :][None])
        for part, key in zip(halves, turned, strict=True):
            out_ref[:, part] = key.astype(out_ref.dtype)


def _slot(tables_ref, sequence, page, pool_ref):
    """The slot of a page, inside the pool whatever the table says."""
    slot = tables_ref[sequence, jnp.minimum(page, tables_ref.shape[1] - 1)]
    return jnp.clip(slot, 0, pool_ref.shape[0] - 1)
