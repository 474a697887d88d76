"""Causal attention of new tokens over the pages of their context, themselves included.

Knows which implementations there are and when each is used. Does not know where pages
came from.
"""

from typing import no_type_check

import jax
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

# From so many new tokens on it pays to say that they have no history.
FRESH_TOKENS = 2048


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
    has_history: bool = True,
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
        has_history: False promises that all `starts` are 0.
        backend: one of `backends.BACKENDS`, or "auto" for the one of the platform: on
            CUDA cuDNN for `FRESH_TOKENS` new tokens and more without a history, on
            Hopper Mosaic GPU for all else, and Triton for what these cannot do.
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
    if backend == "auto" and resolved == "triton":
        resolved = _best_on_cuda(query, pool, options, has_history)
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
            require(
                not has_history, "cudnn", "a history: its causal mask has no offset"
            )
            return cudnn_attention.prefill(
                query, pool, page_tables, lengths, rope, **options
            )
        case other:
            require(False, other, "prefill_attention")


def _best_on_cuda(query, pool, options, has_history) -> str:
    """The fastest implementation that can do it, by an H200.

    8K tokens of context, 32 heads, 8 kv heads; Triton and Mosaic GPU take 104 and 83 us
    for 128 new tokens, 294 and 199 for 512, 864 and 555 for 2K, 1907 and 1279 for 8K.
    """
    plain = options["window"] is None and options["soft_cap"] is None
    narrow = query.dtype == pool.dtype == jnp.bfloat16
    if not (plain and narrow and query.shape[-1] in (64, 128)):
        return "triton"
    if query.shape[1] >= FRESH_TOKENS and not has_history:
        return "cudnn"
    has_pages_it_can = pool.shape[4] in (16, 32, 64, 128, 256)
    return "mosaic_gpu" if _is_hopper() and has_pages_it_can else "triton"


def _is_hopper() -> bool:
    capability = getattr(jax.devices()[0], "compute_capability", "")
    return str(capability).startswith("9.")
