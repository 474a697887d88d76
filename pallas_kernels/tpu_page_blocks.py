"""Blocks of pages on their way to VMEM, one block ahead of the program that reads them.

Knows which pages each program of a TPU kernel visits and in what order programs run.
Does not know what a program computes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.backends import require
from pallas_kernels.rope import RopeTables

LANES = 128
# Every generation since v5e has 64 MiB or more; what XLA gives a kernel unasked is 16.
VMEM_BYTES = 48 << 20
TABLE_BYTES = 896 << 10  # of 1 MiB of SMEM
ROTATION_BYTES = 16 << 20

# Copies issued per turn of a loop: compiled for v5e, 10 bundles each; one by one 18,
# and with bounds checks 38.
UNROLL = 8

_FIRST, _END, _BLOCKS_BEFORE, _NEXT, _LEADS = range(5)


def check_supported(
    query: Float[Array, "batch *rows heads head_dim"],
    pool: Shaped[Array, "slots layers kv_heads 2 page_tokens head_dim"],
    page_tables: Int[Array, "batch pages_per_sequence"],
) -> None:
    """Raises NotImplementedError for what the TPU kernels cannot do.

    They take a pool of head_dim 64 too, but only one that is row-major costs no copy of
    it: by default XLA makes another axis than head_dim the minor one.
    """
    backend = "mosaic_tpu"
    page_tokens, head_dim = pool.shape[4:]
    batch, width = page_tables.shape
    require(
        pool.dtype == query.dtype and query.dtype in (jnp.float32, jnp.bfloat16),
        backend,
        f"a query of {query.dtype} with a pool of {pool.dtype}, only float32 or "
        "bfloat16 for both",
    )
    require(head_dim in (64, 128, 256), backend, f"{head_dim=}, only 64, 128 and 256")
    require(
        page_tokens in (16, 32, 64, 128, 256),
        backend,
        f"{page_tokens=}, only powers of two from 16 to 256",
    )
    require(
        batch * pl.cdiv(width, LANES) * LANES * 4 <= TABLE_BYTES,
        backend,
        f"page_tables of {batch} x {width}, only up to {TABLE_BYTES >> 10} KiB",
    )
    require(
        2 * width * head_dim * 4 <= ROTATION_BYTES,
        backend,
        f"{width} pages a sequence, only rotations up to {ROTATION_BYTES >> 20} MiB",
    )


def run_programs(
    kernel: Callable,
    scalars: list[Array],
    query: Float[Array, "chains programs ..."],
    rope: RopeTables,
    pool: Shaped[Array, "slots layers kv_heads 2 page_tokens head_dim"],
    *,
    buffer: tuple[int, ...],
    state: list,
    cost: pl.CostEstimate,
    name: str,
    interpret: bool,
) -> Float[Array, "chains programs ..."]:
    """Calls `kernel` with all of `scalars`, a program's part of `query`, the tables of
    `rotate_by_pages`, the pool in HBM, a program's part of the output, two buffers with
    their semaphores, and `state`.

    Args:
        scalars: what is prefetched to SMEM; the second one are the page tables.
        buffer: shape of one buffer.
    """
    part = pl.BlockSpec(
        (1, 1, *query.shape[2:]),
        lambda chain, program, *_: (chain, program, *[0] * (query.ndim - 2)),
    )
    rotations = _page_rotations(rope, scalars[1].shape[1])
    whole = pl.BlockSpec(
        rotations[0].shape, lambda *_: (0, 0), pipeline_mode=pl.Buffered(1)
    )
    strict = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=query.shape[:2],
            in_specs=[part, whole, whole, pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=part,
            scratch_shapes=[
                pltpu.VMEM((2, *buffer), pool.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                *state,
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(query.shape, pool.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES,
            disable_bounds_checks=True,  # page tables are clipped before they come in
        ),
        cost_estimate=cost,
        interpret=strict if interpret else False,
        name=name,
    )(*scalars, query, *rotations, pool)


def plan_visits(
    first_page: Int[Array, " programs"],
    end_page: Int[Array, " programs"],
    *,
    block_pages: int,
    chains: int,
) -> Int[Array, "5 programs"]:
    """Which pages each program visits, and who copies its first block.

    Programs come in `chains` equal runs, each on one core from first to last. A program
    starts the first copies of the next one of its chain that visits any page; the first
    such program of a chain leads, and starts its own.
    """
    num_blocks = (
        jnp.maximum(end_page - first_page, 0) + block_pages - 1
    ) // block_pages
    index = jnp.arange(len(num_blocks), dtype=jnp.int32)
    nowhere = jnp.int32(len(num_blocks))
    working = jnp.where(num_blocks > 0, index, nowhere).reshape(chains, -1)
    from_here = jax.lax.cummin(working, axis=1, reverse=True)
    after = jnp.pad(from_here[:, 1:], ((0, 0), (0, 1)), constant_values=nowhere)
    leads = (working == from_here[:, :1]) & (working < nowhere)
    rows = [
        first_page,
        end_page,
        jnp.cumsum(num_blocks) - num_blocks,
        after.ravel(),
        leads.ravel(),
    ]
    return jnp.stack([row.astype(jnp.int32) for row in rows])


def visit_blocks(
    visits_ref,  # SMEM [5, programs]
    program: Array,
    make_copy: Callable,
    compute: Callable,
    *,
    block_pages: int,
) -> None:
    """Runs compute(first_page, buffer) on each block of a program while the next one,
    which may be of another program, is copied into the other of two buffers.

    Args:
        make_copy: (program, page, buffer, place) to the descriptor of the copy of one
            page to `place` in its block.
    """

    def for_pages(program, block, act):
        first = visits_ref[_FIRST, program] + block * block_pages
        count = jnp.minimum(visits_ref[_END, program] - first, block_pages)
        buffer = _buffer(visits_ref, program, block)
        grouped = count & -UNROLL

        @pl.loop(0, grouped, step=UNROLL)
        def _(group):
            for place in range(UNROLL):
                place += group
                act(make_copy(program, first + place, buffer, place))

        @pl.loop(grouped, count)
        def _(place):
            act(make_copy(program, first + place, buffer, place))

    def start(program, block):
        for_pages(program, block, lambda copy: copy.start())

    pages = visits_ref[_END, program] - visits_ref[_FIRST, program]
    num_blocks = pl.cdiv(jnp.maximum(pages, 0), block_pages)

    @pl.when(visits_ref[_LEADS, program] == 1)
    def _():
        start(program, 0)

    @pl.loop(0, num_blocks)
    def _(block):
        is_last = block + 1 == num_blocks
        next_program = jnp.where(is_last, visits_ref[_NEXT, program], program)

        @pl.when(next_program < visits_ref.shape[1])
        def _():
            start(next_program, jnp.where(is_last, 0, block + 1))

        for_pages(program, block, lambda copy: copy.wait())
        compute(
            visits_ref[_FIRST, program] + block * block_pages,
            _buffer(visits_ref, program, block),
        )


def zero_values_from(
    end,
    first_page,
    value_ref,  # VMEM [..., block_pages, page_tokens, head_dim]
) -> None:
    """Zeroes the values of tokens at `end` and later: they may be NaN, or what an
    earlier block left, and 0 * NaN is NaN."""
    block_pages, page_tokens, _ = value_ref.shape[-3:]
    leading = (slice(None),) * (len(value_ref.shape) - 3)

    whole_pages = jnp.maximum(jax.lax.div(end, page_tokens) - first_page, 0)

    @pl.loop(whole_pages, block_pages)
    def _(place):
        value = value_ref[(*leading, place)]
        offset = jax.lax.broadcasted_iota(jnp.int32, value.shape, value.ndim - 2)
        kept = (first_page + place) * page_tokens + offset < end
        # In float32: v5e selects no 16 bit lanes.
        value = jnp.where(kept, value.astype(jnp.float32), 0).astype(value.dtype)
        value_ref[(*leading, place)] = value


def rotate_by_pages(
    x,  # [rows, head_dim] float32
    swapped,  # swap_halves(x)
    cos_ref,  # VMEM [pages, head_dim], (cos|cos)
    sin_ref,  # VMEM [pages, head_dim], (-sin|sin)
    num_pages,
):
    """R(num_pages * page_tokens) x."""
    row = pl.ds(num_pages, 1)
    return x * cos_ref[row] + swapped * sin_ref[row]


def swap_halves(x):
    """(second, first) of the halves of the last axis."""
    half = x.shape[-1] // 2
    if x.shape[-1] % LANES == 0:
        return pltpu.roll(x, half, x.ndim - 1)
    return jnp.concatenate([x[..., half:], x[..., :half]], axis=-1)


def _buffer(visits_ref, program, block):
    return (visits_ref[_BLOCKS_BEFORE, program] + block) & 1


def _page_rotations(rope, num_pages):
    """(cos|cos) and (-sin|sin), each [num_pages, head_dim]."""
    cos, sin = rope.page_cos[:num_pages], rope.page_sin[:num_pages]
    return jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)
