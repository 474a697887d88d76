"""Softmax-weighted sums over a context that arrives block by block.

Knows the running maximum, sum and weighted sum. Does not know what a block holds.
"""

from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@no_type_check  # a pytree is also built of shapes and of what jax asks about it
@dataclass(frozen=True, kw_only=True)
class SoftmaxState:
    """What is known of the softmax of each row after the blocks seen so far.

    Attributes:
        peak: largest score; -inf before the first block.
        total: sum of exp(score - peak).
        weighted: sum of exp(score - peak) * value.
    """

    peak: Float[Array, "batch kv_heads rows"]
    total: Float[Array, "batch kv_heads rows"]
    weighted: Float[Array, "batch kv_heads rows head_dim"]


def empty_state(shape: tuple[int, int, int, int]) -> SoftmaxState:
    """The state before any block, for [batch, kv_heads, rows, head_dim] outputs."""
    return SoftmaxState(
        peak=jnp.full(shape[:3], -jnp.inf, jnp.float32),
        total=jnp.zeros(shape[:3], jnp.float32),
        weighted=jnp.zeros(shape, jnp.float32),
    )


def add_block(
    state: SoftmaxState,
    score: Float[Array, "batch kv_heads rows tokens"],
    value: Float[Array, "batch kv_heads tokens head_dim"],
) -> SoftmaxState:
    """Takes one more block into account; a score of -inf leaves its token out.

    Rescales by the change of the maximum (Milakov and Gimelshein, 2018).
    """
    peak = jnp.maximum(state.peak, score.max(axis=-1))
    # A row with nothing but -inf so far would compute -inf - -inf.
    finite_peak = jnp.where(jnp.isfinite(peak), peak, 0)
    weight = jnp.exp(score - finite_peak[..., None])
    rescale = jnp.exp(state.peak - finite_peak)
    weighted = jnp.einsum("bkrt,bktd->bkrd", weight, value)
    return SoftmaxState(
        peak=peak,
        total=state.total * rescale + weight.sum(axis=-1),
        weighted=state.weighted * rescale[..., None] + weighted,
    )


def finish(state: SoftmaxState) -> Float[Array, "batch kv_heads rows head_dim"]:
    """The weighted means; zeros for rows that saw no token."""
    return state.weighted / jnp.where(state.total == 0, 1, state.total)[..., None]
