"""Softmax-weighted sums over a context that arrives block by block, in VMEM of a TPU.

Knows the running maximum, sum and weighted sum of rows. Does not know what a block
holds. `online_softmax.py` says the same in jax.numpy.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu_page_blocks import LANES

# Finite: a row that sees no token of a block gets weights 1 from it, which the first
# token that it sees rescales to 0, and exp(-inf - -inf) never happens.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def softmax_scratch(*rows: int, head_dim: int) -> list:
    """Peak, total and weighted sum of [*rows]; the first two fill the lanes with
    copies, which spares a broadcast at every use."""
    return [
        pltpu.VMEM((*rows, width), jnp.float32) for width in (LANES, LANES, head_dim)
    ]


def clear(state) -> None:
    """The state before any block."""
    for ref, value in zip(state, (MASKED, 0, 0), strict=True):
        ref[...] = jnp.full(ref.shape, value, ref.dtype)


def add_block(
    state,  # of [rows]
    score,  # [chunks, rows, tokens], MASKED where a row does not see a token
    value,  # [chunks, tokens, head_dim]
) -> None:
    """Takes one more block into account, which may be in several chunks."""
    peak_ref, total_ref, weighted_ref = state
    old_peak = peak_ref[...]
    peak = jnp.maximum(old_peak, score.max(axis=0).max(axis=-1, keepdims=True))
    weight = jnp.exp(score - _across(peak, score.shape[-1]))
    rescale = jnp.exp(old_peak - peak)
    total = weight.sum(axis=0).sum(axis=-1, keepdims=True)
    weighted = dot(weight.astype(value.dtype), value, over=1).sum(axis=0)
    peak_ref[...] = peak
    total_ref[...] = total_ref[...] * rescale + total
    rescale = _across(rescale, value.shape[-1])
    weighted_ref[...] = weighted_ref[...] * rescale + weighted


def finish(state):
    """The weighted means [rows, head_dim]; zeros for rows before any block."""
    _, total_ref, weighted_ref = state
    total = _across(total_ref[...], weighted_ref.shape[-1])
    return weighted_ref[...] / jnp.where(total == 0, 1, total)


def dot(left, right, *, over: int):
    """Products of [chunks, rows, n] and a stack of matrices, summed over axis `over`
    of the latter, in float32."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        left,
        right,
        (((2,), (over,)), ((0,), (0,))),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def cap_scores(score, soft_cap: float | None):
    return score if soft_cap is None else soft_cap * jnp.tanh(score / soft_cap)


def _across(x, width: int):
    """[rows, LANES] of copies as [rows, width]."""
    if width <= LANES:
        return x[:, :width]
    if width % LANES:
        return jnp.broadcast_to(x[:, :1], (x.shape[0], width))
    return jnp.tile(x, (1, width // LANES))
