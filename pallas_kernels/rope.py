"""Rotary position embedding split into an offset inside a page and a number of pages.

Knows rotations and tables. Does not know models or how frequencies are scaled: it takes
inverse frequencies as given.

A query at position m scores a key at position n = p*P + j (page p, offset j, P tokens a
page) as q^T R(n - m) k. A page stores R(j) k, so a page holds no absolute position:

    decode    score = (R(m - p*P) q)^T k'     one rotation of the query per page
    prefill   k_abs = R(p*P) k'               one rotation of each key at the gather
"""

from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@no_type_check  # a pytree is also built of shapes and of what jax asks about it
@dataclass(frozen=True, kw_only=True)
class RopeTables:
    """Cosines and sines of every offset inside a page and of every whole page, float32.

    Attributes:
        offset_cos, offset_sin: [page_tokens, head_dim / 2], rotation by 0..P-1 tokens.
        page_cos, page_sin: [num_pages, head_dim / 2], rotation by 0, P, 2P, ... tokens.
    """

    offset_cos: Float[Array, "page_tokens half"]
    offset_sin: Float[Array, "page_tokens half"]
    page_cos: Float[Array, "num_pages half"]
    page_sin: Float[Array, "num_pages half"]

    @property
    def page_tokens(self) -> int:
        return self.offset_cos.shape[0]


def rope_tables(
    inverse_frequencies: np.ndarray, *, page_tokens: int, num_pages: int
) -> RopeTables:
    """Builds the tables for sequences of up to `num_pages` pages.

    Args:
        inverse_frequencies: float64 [head_dim / 2], radians per token.
    """
    # float64 angles: a float32 product is 0.01 rad off near position 1e5.
    frequencies = np.asarray(inverse_frequencies, np.float64)
    offset_angles = np.arange(page_tokens)[:, None] * frequencies
    page_angles = page_tokens * np.arange(num_pages)[:, None] * frequencies
    return RopeTables(
        offset_cos=jnp.asarray(np.cos(offset_angles), jnp.float32),
        offset_sin=jnp.asarray(np.sin(offset_angles), jnp.float32),
        page_cos=jnp.asarray(np.cos(page_angles), jnp.float32),
        page_sin=jnp.asarray(np.sin(page_angles), jnp.float32),
    )


def rotate(
    x: Float[Array, "*#rows head_dim"],
    cos: Float[Array, "*#rows half"],
    sin: Float[Array, "*#rows half"],
) -> Float[Array, "... head_dim"]:
    """Rotates the pairs (x[i], x[i + head_dim/2]); computes in float32, keeps the
    dtype.

    The half-split pairing is the one of the Hugging Face Llama weights (Su et al.,
    RoFormer, 2021, pair neighbours instead; a fixed permutation of the weights).
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
    return rotated.astype(x.dtype)


def rotate_to(
    x: Float[Array, "batch tokens heads head_dim"],
    position: Int[Array, "batch tokens"],
    rope: RopeTables,
) -> Float[Array, "batch tokens heads head_dim"]:
    """R(position) x, by the angle of the whole pages plus that of the offset in one."""
    page, offset = position // rope.page_tokens, position % rope.page_tokens
    page_cos, page_sin = rope.page_cos[page], rope.page_sin[page]
    offset_cos, offset_sin = rope.offset_cos[offset], rope.offset_sin[offset]
    cos = page_cos * offset_cos - page_sin * offset_sin
    sin = page_sin * offset_cos + page_cos * offset_sin
    return rotate(x, cos[:, :, None], sin[:, :, None])
