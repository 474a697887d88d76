"""The Llama over paged KV: one layer group of a prefill, one step of a decode.

Knows layers, pools and page tables. Does not know which session a page belongs to.
These are pure functions to be jitted by the engine with their pools donated.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Shaped

from cachedattn_jax.model.config import LlamaConfig
from cachedattn_jax.model.llama import LlamaParams, apply_layer, embed, unembed
from cachedattn_jax.model.sharding import over_kv_heads
from pallas_kernels.backends import DEFAULT_KERNELS, Kernels
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.page_copy import append_tokens
from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.rope import RopeTables


def prefill_group(
    config: LlamaConfig,
    layers: Sequence[dict],
    x: Float[Array, "batch new_tokens hidden"],
    pool: Shaped[Array, "slots layers kv_heads 2 page_tokens head_dim"],
    page_tables: Int[Array, "batch pages_per_sequence"],
    starts: Int[Array, " batch"],
    lengths: Int[Array, " batch"],
    rope: RopeTables,
    *,
    has_history: bool = True,
    kernels: Kernels = DEFAULT_KERNELS,
    mesh: Mesh | None = None,
) -> tuple[
    Float[Array, "batch new_tokens hidden"],
    Shaped[Array, "slots layers kv_heads 2 page_tokens head_dim"],
]:
    """Runs the layers of one group over new tokens whose context is in the pool.

    The tokens at positions starts..lengths-1 are written to the pool before attention
    reads it: gathering first makes XLA on CPU copy the pool.

    Args:
        has_history: False promises that all `starts` are 0.
        mesh: devices that share the kv heads; see `sharding`.

    Returns:
        The hidden state after the group, and the pool, updated in place when donated.
    """
    where = page_tables, starts, lengths, rope
    for index, layer in enumerate(layers):

        def attend_in_pool(query, key, value, pool, *where, layer_index=index):
            pool = append_tokens(
                pool,
                key,
                value,
                *where,
                layer=layer_index,
                backend=kernels.prefill,
                interpret=kernels.interpret,
            )
            output = prefill_attention(
                query,
                pool,
                *where,
                layer=layer_index,
                has_history=has_history,
                backend=kernels.prefill,
                interpret=kernels.interpret,
            )
            return output, pool

        def attend(query, key, value, attend=over_kv_heads(mesh, attend_in_pool)):
            nonlocal pool
            output, pool = attend(query, key, value, pool, *where)
            return output

        x = apply_layer(config, layer, x, attend)
    return x, pool


def decode_step(
    config: LlamaConfig,
    params: LlamaParams,
    token_ids: Int[Array, " batch"],
    pools: Sequence[Shaped[Array, "slots layers kv_heads 2 page_tokens head_dim"]],
    page_tables: Int[Array, "batch pages_per_sequence"],
    lengths: Int[Array, " batch"],
    rope: RopeTables,
    *,
    kernels: Kernels = DEFAULT_KERNELS,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "batch vocab"], list[Array]]:
    """One new token of each sequence through the whole model.

    Args:
        token_ids: the token at position `lengths - 1` of each sequence.
        lengths: tokens of context, the new one included; 0 for rows that are padding.
        mesh: devices that share the kv heads; see `sharding`.

    Returns:
        Logits in float32, and the pools, updated in place when donated.
    """
    pools = list(pools)
    layers_per_group = len(params.layers) // len(pools)
    where = page_tables, lengths, rope
    x = embed(config, params, token_ids[:, None])
    for index, layer in enumerate(params.layers):
        group, place = divmod(index, layers_per_group)

        def attend_in_pool(
            query, key, value, pool, page_tables, lengths, rope, place=place
        ):
            starts = jnp.maximum(lengths - 1, 0)
            pool = append_tokens(
                pool,
                key,
                value,
                page_tables,
                starts,
                lengths,
                rope,
                layer=place,
                backend=kernels.decode,
                interpret=kernels.interpret,
            )
            output = decode_attention(
                query[:, 0],
                pool,
                page_tables,
                lengths,
                rope,
                layer=place,
                backend=kernels.decode,
                interpret=kernels.interpret,
            )
            return output[:, None], pool

        def attend(
            query, key, value, group=group, attend=over_kv_heads(mesh, attend_in_pool)
        ):
            output, pools[group] = attend(query, key, value, pools[group], *where)
            return output

        x = apply_layer(config, layer, x, attend)
    return unembed(config, params, x[:, 0]), pools
