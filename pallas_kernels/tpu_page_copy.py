"""Page moves as Pallas kernels for TPU.

Knows pools in HBM and slots. Does not know what pages hold. XLA on TPU copies the whole
pool to gather large pages from it (480 MiB of temporaries for 16 pages of Llama-2-13B
of 256 tokens); writing whole pages it does in place, so that needs no kernel.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.backends import require
from pallas_kernels.tpu_page_blocks import VMEM_BYTES

_STRICT = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


def extract_pages(
    pool: Shaped[Array, "slots layers kv_heads 2 page_tokens head_dim"],
    slots: Int[Array, " pages"],
    *,
    layer: int | None = None,
    interpret: bool = False,
) -> Shaped[Array, "pages taken_layers kv_heads 2 page_tokens head_dim"]:
    """`page_copy.extract_pages`, of one layer or of all, one tile of a kv head at a
    time.
    """
    num_slots, layers, kv_heads, _, page_tokens, head_dim = pool.shape
    first, taken = (0, layers) if layer is None else (layer, 1)
    tile = (None, None, None, 2, page_tokens, head_dim)
    slots = jnp.clip(slots, 0, num_slots - 1).astype(jnp.int32)
    return pl.pallas_call(
        _copy,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(len(slots), taken, kv_heads),
            in_specs=[
                pl.BlockSpec(
                    tile, lambda p, at, h, slots: (slots[p], first + at, h, 0, 0, 0)
                )
            ],
            out_specs=pl.BlockSpec(tile, lambda p, at, h, slots: (p, at, h, 0, 0, 0)),
        ),
        out_shape=jax.ShapeDtypeStruct(
            (len(slots), taken, *pool.shape[2:]), pool.dtype
        ),
        cost_estimate=pl.CostEstimate(
            flops=0,
            transcendentals=0,
            bytes_accessed=2 * len(slots) * taken * _page_bytes(pool),
        ),
        interpret=_STRICT if interpret else False,
        name="extract_pages",
    )(slots, pool)


def _copy(slots_ref, pool_ref, out_ref):
    del slots_ref  # the block specs read it
    out_ref[...] = pool_ref[...]


def append_token(
    pool: Shaped[Array, "slots layers kv_heads 2 page_tokens head_dim"],
    tokens: Float[Array, "batch kv_heads 2 head_dim"],
    slots: Int[Array, " batch"],
    offsets: Int[Array, " batch"],
    *,
    layer: int,
    interpret: bool = False,
) -> Shaped[Array, "slots layers kv_heads 2 page_tokens head_dim"]:
    """Writes one token into each of some pages, in place.

    Memory moves in tiles of 16 tokens (8 in float32): those around the token are read,
    changed and written, all sequences at once. Rows whose slot is outside the pool
    write nothing; no two rows may name the same slot.
    """
    batch, kv_heads, _, head_dim = tokens.shape
    tile_tokens = 32 // pool.dtype.itemsize
    tile_bytes = kv_heads * 2 * tile_tokens * max(head_dim, 128) * pool.dtype.itemsize
    require(
        batch * tile_bytes <= VMEM_BYTES // 2,
        "mosaic_tpu",
        f"a decode of {batch} sequences x {kv_heads} kv heads in one step",
    )
    return pl.pallas_call(
        functools.partial(_append, layer=layer, tile_tokens=tile_tokens),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(1,),
            in_specs=[
                pl.BlockSpec(memory_space=pltpu.VMEM),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((batch, kv_heads, 2, tile_tokens, head_dim), pool.dtype),
                pltpu.SemaphoreType.DMA((2, batch)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(pool.shape, pool.dtype),
        input_output_aliases={3: 0},
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=2 * batch * tile_bytes
        ),
        interpret=_STRICT if interpret else False,
        name="append_token",
    )(
        slots.astype(jnp.int32),
        offsets.astype(jnp.int32),
        tokens[:, :, :, None].astype(pool.dtype),
        pool,
    )


def _append(
    slots_ref,  # SMEM [batch]
    offsets_ref,  # SMEM [batch]
    tokens_ref,  # VMEM [batch, kv_heads, 2, 1, head_dim]
    _,  # the pool before
    pool_ref,  # HBM, the pool
    tiles,  # VMEM [batch, kv_heads, 2, tile_tokens, head_dim]
    semaphores,
    *,
    layer: int,
    tile_tokens: int,
):
    batch, num_slots = tiles.shape[0], pool_ref.shape[0]

    def tile_of(row):
        first = offsets_ref[row] // tile_tokens * tile_tokens
        first = pl.multiple_of(first, tile_tokens)
        slot = slots_ref[row]
        return pool_ref.at[slot, layer, :, :, pl.ds(first, tile_tokens)]

    def for_each_row(act):
        @pl.loop(0, batch)
        def _(row):
            @pl.when((slots_ref[row] >= 0) & (slots_ref[row] < num_slots))
            def _():
                act(row)

    # A semaphore a row: one for all would let a row pass on the bytes of another.
    def read(row):
        return pltpu.make_async_copy(tile_of(row), tiles.at[row], semaphores.at[0, row])

    def write(row):
        return pltpu.make_async_copy(tiles.at[row], tile_of(row), semaphores.at[1, row])

    def change(row):
        read(row).wait()
        place = jax.lax.broadcasted_iota(jnp.int32, tiles.shape[1:], 2)
        is_new = place == offsets_ref[row] % tile_tokens
        tiles[row] = jnp.where(is_new, tokens_ref[row], tiles[row])
        write(row).start()

    for_each_row(lambda row: read(row).start())
    for_each_row(change)
    for_each_row(lambda row: write(row).wait())


def _page_bytes(pool: Array) -> int:
    """One page of one layer."""
    _, _, kv_heads, _, page_tokens, head_dim = pool.shape
    return kv_heads * 2 * page_tokens * head_dim * pool.dtype.itemsize
