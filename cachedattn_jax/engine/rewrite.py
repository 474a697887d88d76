"""Pages whose tokens move to other places when single tokens are dropped.

Knows positions, slots and the rotation that goes with a move: a key that moves inside
its page is turned by R(j_new - j_old). Does not know why tokens were dropped.
"""

from dataclasses import dataclass

import jax
import numpy as np

from cachedattn_jax.store.chain import first_rewritten
from cachedattn_jax.store.device_pool import DevicePool
from cachedattn_jax.store.truncation import Context, Truncation
from pallas_kernels.page_copy import move_tokens

_move = jax.jit(move_tokens, static_argnames="dtype", donate_argnums=0)


@dataclass(frozen=True, kw_only=True)
class Rewrite:
    """Tokens to be moved, with their rotation.

    Attributes:
        slots: int32 [pages_per_sequence], where they go; the number of slots of the
            pool for pages that stay as they are.
        source_slots, source_offsets: int32 [pages_per_sequence, page_tokens], where
            they are.
        cos, sin: float32 [pages_per_sequence, page_tokens, head_dim / 2].
    """

    slots: np.ndarray
    source_slots: np.ndarray
    source_offsets: np.ndarray
    cos: np.ndarray
    sin: np.ndarray

    def run(self, pool: DevicePool, group: int, dtype: str) -> None:
        """Dispatches the moves in one layer group."""
        pool.arrays[group] = _move(
            pool.arrays[group],
            self.slots,
            self.source_slots,
            self.source_offsets,
            self.cos,
            self.sin,
            dtype=dtype,
        )


def plan_rewrite(
    truncation: Truncation,
    context: Context,
    tables: tuple[np.ndarray, np.ndarray],
    *,
    page_tokens: int,
    num_slots: int,
    inverse_frequencies: np.ndarray,
) -> Rewrite:
    """What a truncation that rewrites pages moves.

    Args:
        context: what there was before.
        tables: int32 [pages_per_sequence], the page table before and after.
        num_slots: of the pool.
    """
    before, after = tables
    first = first_rewritten(truncation, page_tokens)
    num_tokens = context.without(truncation.dropped).position(truncation.at)
    last = -(-num_tokens // page_tokens)
    places = np.arange(len(after) * page_tokens)
    left = np.zeros(len(places), np.int64)
    tokens = context.without(truncation.dropped).tokens(0, num_tokens)
    left[:num_tokens] = [context.position(token) for token in tokens.tolist()]
    slots = np.full(len(after), num_slots, np.int32)
    slots[first:last] = after[first:last]
    if truncation.method == "naive":
        # The key keeps the position it had: that of its old page, seen from the new.
        turned = (left // page_tokens - places // page_tokens) * page_tokens
    else:
        turned = places % page_tokens - left % page_tokens
    shape = (len(after), page_tokens)
    # float64 angles: see `pallas_kernels.rope.rope_tables`.
    angles = turned.reshape(shape)[..., None] * np.asarray(inverse_frequencies)
    return Rewrite(
        slots=slots,
        source_slots=before[left // page_tokens].astype(np.int32).reshape(shape),
        source_offsets=(left % page_tokens).astype(np.int32).reshape(shape),
        cos=np.cos(angles).astype(np.float32),
        sin=np.sin(angles).astype(np.float32),
    )
