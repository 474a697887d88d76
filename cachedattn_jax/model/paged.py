"""The Llama over paged KV: one layer group of a prefill, one step of a decode.

Knows layers, pools and page tables. Does not know which session a page belongs to.
These are pure functions to be jitted by the engine with their pools donated.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from cachedattn_jax.model.config import LlamaConfig
from cachedattn_jax.model.llama import LlamaParams, apply_layer, embed, unembed
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
) -> tuple[
    Float[Array, "batch new_tokens hidden"],
    Shaped[Array, "slots layers kv_heads 2 page_tokens head_dim"],
]:
    """Runs the layers of one group over new tokens whose context is in the pool.

    The tokens at positions starts..lengths-1 are written to the pool before attention
    reads it: gathering first makes XLA on CPU copy the pool.

    Returns:
        The hidden state after the group, and the pool, updated in place when donated.
    """
    for index, layer in enumerate(layers):

        def attend(query, key, value, layer_index=index):
            nonlocal pool
            pool = append_tokens(
                pool, key, value, page_tables, starts, lengths, rope, layer=layer_index
            )
            return prefill_attention(
                query, pool, page_tables, starts, lengths, rope, layer=layer_index
            )

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
) -> tuple[Float[Array, "batch vocab"], list[Array]]:
    """One new token of each sequence through the whole model.

    Args:
        token_ids: the token at position `lengths - 1` of each sequence.
        lengths: tokens of context, the new one included; 0 for rows that are padding.

    Returns:
        Logits in float32, and the pools, updated in place when donated.
    """
    pools = list(pools)
    layers_per_group = len(params.layers) // len(pools)
    x = embed(config, params, token_ids[:, None])
    for index, layer in enumerate(params.layers):
        group, place = divmod(index, layers_per_group)

        def attend(query, key, value, group=group, place=place):
            pools[group] = append_tokens(
                pools[group],
                key,
                value,
                page_tables,
                jnp.maximum(lengths - 1, 0),
                lengths,
                rope,
                layer=place,
            )
            return decode_attention(
                query[:, 0], pools[group], page_tables, lengths, rope, layer=place
            )[:, None]

        x = apply_layer(config, layer, x, attend)
    return unembed(config, params, x[:, 0]), pools
