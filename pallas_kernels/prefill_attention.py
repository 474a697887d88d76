"""Causal attention of new tokens over the pages of their context, themselves included.

Knows which implementations there are and when each is used. Does not know where pages
came from.
"""

from typing import no_type_check

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels import (
    cudnn_attention,
    mosaic_gpu_attention,
    tpu_prefill_attention,
    triton_attention,
    xla_attention,
)
from pallas_kernels.backends import (
    AUTO,
    DEFAULT_BLOCKS,
    Blocks,
    check_arguments,
    require,
    resolve_backend,
)
from pallas_kernels.rope import RopeTables


@no_type_check  # callers' mistakes are told in words of ours
def prefill_attention(
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
    backend: str = "auto",
    blocks: Blocks = DEFAULT_BLOCKS,
    interpret: bool = False,
) -> Float[Array, "batch new_tokens heads head_dim"]:
    """Softmax attention of the tokens at starts, starts+1, ... over tokens
    0..lengths-1.

    Token t sees positions up to `starts + t`; its own keys are in the pages already.
    `query` comes unrotated. Tokens past `lengths - starts` are padding: their outputs
    are finite and mean nothing.

    Args:
        window: tokens that each token sees, itself included; None for all.
        soft_cap: scores become soft_cap * tanh(score / soft_cap).
        backend: one of `backends.BACKENDS`, or "auto" for the one of the platform: on
            CUDA cuDNN from 512 new tokens on where it can, else Triton.
        interpret: run a Pallas kernel in its interpreter, on any platform.

    Raises:
        ValueError: arguments do not fit together, or no such backend.
        NotImplementedError: the backend cannot do this; the message says what.
    """
    check_arguments(query, pool, page_tables, lengths, rope, layer, window, soft_cap)
    if starts.shape != lengths.shape:
        raise ValueError(
            f"starts is for a batch of {starts.shape[0]}, lengths of {lengths.shape[0]}"
        )
    options = {"layer": layer, "window": window, "soft_cap": soft_cap, "blocks": blocks}
    arguments = query, pool, page_tables, starts, lengths, rope
    resolved = resolve_backend(backend, AUTO)
    if (
        backend == "auto"
        and resolved == "triton"
        and _suits_cudnn(query, pool, options)
    ):
        resolved = "cudnn"
    match resolved:
        case "xla":
            return xla_attention.prefill(*arguments, **options)
        case "mosaic_tpu":
            return tpu_prefill_attention.prefill(
                *arguments, **options, interpret=interpret
            )
        case "triton":
            return triton_attention.prefill(*arguments, **options, interpret=interpret)
        case "mosaic_gpu":
            return mosaic_gpu_attention.prefill(
                *arguments, **options, interpret=interpret
            )
        case "cudnn":
            return cudnn_attention.prefill(*arguments, **options)
        case other:
            require(False, other, "prefill_attention")


def _suits_cudnn(query, pool, options) -> bool:
    """Whether cuDNN's faster products outweigh its gather and its second call.

    On an H200, 8K tokens of context, 32 heads, 8 kv heads, Triton against cuDNN: 111 us
    and 208 for 128 new tokens, 364 and 257 for 512, 1773 and 1231 for 8K.
    """
    plain = options["window"] is None and options["soft_cap"] is None
    can = query.dtype == pool.dtype == jnp.bfloat16 and query.shape[-1] in (64, 128)
    return plain and can and query.shape[1] >= 512
