"""The next token from logits, on the device. Knows no sessions, pages or batches."""

from dataclasses import dataclass, field
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt

from cachedattn_jax.engine.request import SamplingParams


@jax.tree_util.register_dataclass
@no_type_check  # a pytree is also built of shapes and of what jax asks about it
@dataclass(frozen=True, kw_only=True)
class SamplingBatch:
    """The sampling parameters of a batch, a row a sequence.

    Attributes:
        top_k: 0 for all tokens.
        is_greedy: whether every row takes its best token. Known when the program is
            made: XLA for CUDA may read the outcome of a branch on the host, which then
            waits for all programs before it.
    """

    temperature: Float[Array | np.ndarray, " batch"]
    top_k: Int[Array | np.ndarray, " batch"]
    top_p: Float[Array | np.ndarray, " batch"]
    seed: UInt[Array | np.ndarray, " batch"]
    is_greedy: bool = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@no_type_check  # a pytree is also built of shapes and of what jax asks about it
@dataclass(frozen=True, kw_only=True)
class Sampled:
    """The chosen tokens, and how far the best logit lies above the second best."""

    token_ids: Int[Array, " batch"]
    margins: Float[Array, " batch"]

    def send(self) -> None:
        """Starts the copies to the host, ahead of those of pages that come later.

        Behind 400 MB of pages a token came 8 ms late on an H100.
        """
        for array in (self.token_ids, self.margins):
            array.copy_to_host_async()


def sampling_batch(params: list[SamplingParams], batch_size: int) -> SamplingBatch:
    """Host arrays for a batch; rows past `params` are greedy padding."""
    params = params + [SamplingParams()] * (batch_size - len(params))
    return SamplingBatch(
        temperature=np.asarray([p.temperature for p in params], np.float32),
        top_k=np.asarray([p.top_k or 0 for p in params], np.int32),
        top_p=np.asarray([p.top_p for p in params], np.float32),
        seed=np.asarray([p.seed for p in params], np.uint32),
        is_greedy=all(p.temperature == 0 for p in params),
    )


def sample(
    logits: Float[Array, "batch vocab"],
    params: SamplingBatch,
    positions: Int[Array, " batch"],
) -> Sampled:
    """One token a row.

    Args:
        positions: of the tokens to choose; with the seed they are the only randomness,
            so a row does not depend on its batch mates or on when it runs.
    """
    best, second = _two_largest(logits)
    token_ids = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # Sorting the vocabulary costs more than a small decode step; skip it if nobody
    # asks.
    if not params.is_greedy:
        sampled = _sample_rows(logits, params, positions)
        token_ids = jnp.where(params.temperature > 0, sampled, token_ids)
    return Sampled(token_ids=token_ids, margins=best - second)


def _two_largest(
    logits: Float[Array, "batch vocab"],
) -> tuple[Float[Array, " batch"], Float[Array, " batch"]]:
    best = logits.max(axis=-1)
    index = jnp.argmax(logits, axis=-1)
    others = jnp.where(jnp.arange(logits.shape[-1]) == index[:, None], -jnp.inf, logits)
    return best, others.max(axis=-1)


def _sample_rows(
    logits: Float[Array, "batch vocab"],
    params: SamplingBatch,
    positions: Int[Array, " batch"],
) -> Int[Array, " batch"]:
    temperature = jnp.maximum(params.temperature, 1e-6)
    ranked = jnp.argsort(-logits, axis=-1).astype(jnp.int32)
    scaled = jnp.take_along_axis(logits, ranked, axis=-1) / temperature[:, None]
    rank = jnp.arange(logits.shape[-1])
    scaled = jnp.where(
        (params.top_k[:, None] > 0) & (rank >= params.top_k[:, None]), -jnp.inf, scaled
    )
    probability = jax.nn.softmax(scaled, axis=-1)
    # A token stays if those before it have not reached top_p; the first always does.
    before = jnp.cumsum(probability, axis=-1) - probability
    scaled = jnp.where(before < params.top_p[:, None], scaled, -jnp.inf)

    def choose(seed, position, row):
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.categorical(key, row)

    chosen = jax.vmap(choose)(params.seed, positions, scaled)
    return jnp.take_along_axis(ranked, chosen[:, None], axis=-1)[:, 0]
