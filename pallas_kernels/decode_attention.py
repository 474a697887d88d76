"""Attention of one new token per sequence over the pages of its context.

Knows which implementations there are and when each is used. Does not know where pages
came from.
"""

from typing import no_type_check

from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels import (
    mosaic_gpu_attention,
    tpu_decode_attention,
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
def decode_attention(
    query: Float[Array, "batch heads head_dim"],
    pool: Shaped[Array, "slots layers kv_heads 2 page_tokens head_dim"],
    page_tables: Int[Array, "batch pages_per_sequence"],
    lengths: Int[Array, " batch"],
    rope: RopeTables,
    *,
    layer: int,
    window: int | None = None,
    soft_cap: float | None = None,
    backend: str = "auto",
    blocks: Blocks = DEFAULT_BLOCKS,
    interpret: bool = False,
) -> Float[Array, "batch heads head_dim"]:
    """Softmax attention of the token at position `lengths - 1` over tokens
    0..lengths-1.

    `query` comes unrotated; it is rotated once per page, the stored keys never. Rows of
    length 0 are padding and return zeros. What slots hold past a length is never used.
    No library kernel serves here: cuDNN's and jax's paged attention want keys at
    absolute positions.

    Args:
        window: tokens that the new one sees, itself included; None for all.
        soft_cap: scores become soft_cap * tanh(score / soft_cap).
        backend: one of `backends.BACKENDS`, or "auto" for the one of the platform.
        interpret: run a Pallas kernel in its interpreter, on any platform.

    Raises:
        ValueError: arguments do not fit together, or no such backend.
        NotImplementedError: the backend cannot do this; the message says what.
    """
    check_arguments(query, pool, page_tables, lengths, rope, layer, window, soft_cap)
    options = {"layer": layer, "window": window, "soft_cap": soft_cap, "blocks": blocks}
    arguments = query, pool, page_tables, lengths, rope
    match resolve_backend(backend, AUTO):
        case "xla":
            return xla_attention.decode(*arguments, **options)
        case "mosaic_tpu":
            return tpu_decode_attention.decode(
                *arguments, **options, interpret=interpret
            )
        case "triton":
            return triton_attention.decode(*arguments, **options, interpret=interpret)
        case "mosaic_gpu":
            return mosaic_gpu_attention.decode(
                *arguments, **options, interpret=interpret
            )
        case other:
            require(False, other, "decode_attention")
