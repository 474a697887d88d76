"""Paged attention for Hopper GPUs, through the Mosaic GPU backend of Pallas.

Knows how one call is cut up and prepared. Does not know what a program computes.

Positions enter in one of two ways. Few rows are turned back by whole pages, once per
page, in registers, and no key is touched: pages go by the copy engine from global to
shared memory and from there to the tensor cores. For many rows the keys are turned to
absolute positions once, by a pass before.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.backends import DEFAULT_BLOCKS, Blocks, require
from pallas_kernels.mosaic_gpu_kernels import LOG2_E, attend
from pallas_kernels.mosaic_gpu_pages import WARPGROUP_ROWS, Plan, scratch
from pallas_kernels.rope import RopeTables, rotate_to
from pallas_kernels.split_context import count_splits, merge_splits
from pallas_kernels.triton_attention import turn_keys


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
    require(
        pool.shape[4] >= WARPGROUP_ROWS,
        "mosaic_gpu",
        f"a decode in pages of {pool.shape[4]} tokens, only of 64 or more",
    )
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
    """`prefill_attention` by flash attention: a row is a token and a query head."""
    batch, new_tokens, heads, head_dim = query.shape
    kv_heads, page_tokens = pool.shape[2], rope.page_tokens
    group_size = heads // kv_heads
    num_rows = new_tokens * group_size
    plan = _plan(blocks, num_rows, pool)
    _require_supported(query, pool, plan, window, soft_cap)
    row_blocks = pl.cdiv(num_rows, plan.row_block)
    reach = page_tables.shape[1] * page_tokens
    # A program of two warpgroups has a multiprocessor to itself.
    programs = batch * kv_heads * row_blocks * plan.warpgroups
    splits = blocks.splits or count_splits(programs, reach)
    keys = (
        turn_keys(pool, page_tables, lengths, rope, layer=layer, interpret=interpret)
        if plan.turns_keys
        else pool
    )
    rows = _rows(query, starts, rope, kv_heads, row_blocks * plan.row_block)
    if plan.turns_keys:
        rows = rows.astype(pool.dtype)
    out, log_sum = _attend(
        rows,
        keys,
        pool,
        page_tables,
        starts,
        lengths,
        rope.page_cos,
        rope.page_sin,
        jnp.full((1,), layer, jnp.int32),
        plan=plan,
        splits=splits,
        group_size=group_size,
        interpret=interpret,
    )
    merged = merge_splits(out[..., :num_rows, :], log_sum[..., :num_rows])
    merged = merged.astype(query.dtype)
    merged = merged.reshape(batch, kv_heads, new_tokens, group_size, head_dim)
    return jnp.moveaxis(merged, 1, 2).reshape(query.shape)


# Under jit of its own, so that the layers of a model share one lowering.
@functools.partial(
    jax.jit, static_argnames=("plan", "splits", "group_size", "interpret")
)
def _attend(rows, keys, pool, *arguments, plan, splits, group_size, interpret):
    """Per split, the softmax over its part and the base-2 logarithm of its sum."""
    batch, kv_heads, num_rows, head_dim = rows.shape
    shape = (splits, batch, kv_heads, num_rows)
    out_dtype = pool.dtype if splits == 1 else jnp.float32
    return plgpu.kernel(
        functools.partial(
            attend, plan=plan, group_size=group_size, interpret=interpret
        ),
        out_type=[
            jax.ShapeDtypeStruct((*shape, head_dim), out_dtype),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ],
        grid=(num_rows // plan.row_block, batch * kv_heads, splits),
        grid_names=("row_block", "head", "split"),
        num_threads=plan.num_threads,
        thread_name="warpgroup",
        scratch_types=scratch(plan, head_dim),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="paged_attention",
        interpret=_interpreter() if interpret else None,
    )(rows, keys, pool, *arguments)


def _interpreter():
    params = getattr(plgpu, "InterpretGPUParams", None)
    if params is None:
        raise NotImplementedError(
            f'backend="mosaic_gpu" cannot be interpreted by jax {jax.__version__}; '
            "0.12 can"
        )
    return params()


def _rows(
    query: Float[Array, "batch new_tokens heads head_dim"],
    starts: Int[Array, " batch"],
    rope: RopeTables,
    kv_heads: int,
    padded: int,
) -> Float[Array, "batch kv_heads padded head_dim"]:
    """Scaled queries at absolute positions, float32: per kv head, token after token."""
    batch, new_tokens, _, head_dim = query.shape
    reach = rope.page_cos.shape[0] * rope.page_tokens
    position = jnp.minimum(starts[:, None] + jnp.arange(new_tokens), reach - 1)
    scaled = query.astype(jnp.float32) * (head_dim**-0.5 * LOG2_E)
    rows = rotate_to(scaled, position, rope)
    rows = rows.reshape(batch, new_tokens, kv_heads, -1, head_dim)
    rows = jnp.moveaxis(rows, 2, 1).reshape(batch, kv_heads, -1, head_dim)
    return jnp.pad(rows, ((0, 0), (0, 0), (0, padded - rows.shape[2]), (0, 0)))


def _plan(blocks: Blocks, num_rows: int, pool: Array) -> Plan:
    """What `blocks` leaves open, by registers and shared memory."""
    page_tokens = pool.shape[4]
    few = num_rows <= WARPGROUP_ROWS
    turns_keys = blocks.turns_keys
    if turns_keys is None:
        turns_keys = not few or page_tokens < WARPGROUP_ROWS
    if turns_keys:
        rows = blocks.query_rows or (1 if few else 2) * WARPGROUP_ROWS
        tile = blocks.context_tokens or (128 if page_tokens >= 128 else 64)
    else:
        rows, tile = WARPGROUP_ROWS, 64
    # 192 KB of a multiprocessor's shared memory in flight for few rows, in two
    # programs of three stages; 128 KB for many, in one.
    stages = 256 // tile if turns_keys else 3
    return Plan(
        warpgroups=rows // WARPGROUP_ROWS,
        tile=tile,
        tile_copies=pl.cdiv(tile, page_tokens),
        turns_keys=turns_keys,
        stages=blocks.num_stages or stages,
    )


def _require_supported(query, pool, plan, window, soft_cap):
    def demand(condition, what):
        require(condition, "mosaic_gpu", what)

    page_tokens, head_dim = pool.shape[4:]
    demand(window is None, "a window")
    demand(soft_cap is None, "a soft cap")
    demand(
        query.dtype == pool.dtype == jnp.bfloat16,
        f"a pool of {pool.dtype} with queries of {query.dtype}, only bfloat16",
    )
    demand(head_dim in (64, 128), f"{head_dim=}, only 64 and 128")
    demand(
        page_tokens in (16, 32, 64, 128, 256),
        f"{page_tokens=}, only powers of 2 from 16 to 256",
    )
    demand(
        plan.turns_keys or page_tokens >= WARPGROUP_ROWS,
        f"queries turned back in pages of {page_tokens} tokens, only of 64 or more",
    )
    demand(
        plan.tile in (64, 128) and (plan.turns_keys or plan.tile <= page_tokens),
        f"context_tokens={plan.tile}, only 64 and 128",
    )
    demand(plan.warpgroups in (1, 2), f"query_rows={plan.row_block}, only 64 and 128")
