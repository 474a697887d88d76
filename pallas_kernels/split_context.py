"""Softmax over a context in parts that are worked on side by side (flash decoding).

Knows how parts are counted and merged. Does not know who computes a part.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

# Programs that fill the 132 multiprocessors of an H200: a decode of 16 sequences of 8K
# tokens and 8 kv heads reads 3.5 TB/s unsplit, 3.7 in 2 parts, 3.5 in 4.
_ENOUGH_PROGRAMS = 256


def count_splits(programs: int, context_tokens: int) -> int:
    """Parts per context that fill the chip, none below 256 tokens."""
    wanted = pl.cdiv(_ENOUGH_PROGRAMS, programs)
    return max(1, min(wanted, context_tokens // 256))


def merge_splits(
    out: Float[Array, "splits batch kv_heads rows head_dim"],
    log_sum: Float[Array, "splits batch kv_heads rows"],
) -> Float[Array, "batch kv_heads rows head_dim"]:
    """The softmax over a whole context from those over its parts (flash decoding).

    Args:
        log_sum: base-2 logarithm of each part's sum of weights; a part without tokens
            has a large negative one.
    """
    if out.shape[0] == 1:
        return out[0]
    weight = jnp.exp2(log_sum - log_sum.max(axis=0))
    weight = weight / weight.sum(axis=0)
    return jnp.sum(out * weight[..., None], axis=0)
