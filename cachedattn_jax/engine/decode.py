"""The decode of a batch: a step and a choice of tokens, which stay on the device.

Knows rows, seats and batch sizes. Does not know sessions or when a reply ends.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from cachedattn_jax.engine.request import SamplingParams
from cachedattn_jax.engine.sampling import Sampled, sample, sampling_batch
from cachedattn_jax.model.config import LlamaConfig
from cachedattn_jax.model.llama import LlamaParams
from cachedattn_jax.model.paged import decode_step
from cachedattn_jax.store.device_pool import DevicePool
from pallas_kernels.backends import DEFAULT_KERNELS, Kernels
from pallas_kernels.rope import RopeTables

# Batch 1 makes XLA on CPU copy every pool.
_SMALLEST_BATCH = 2


@functools.partial(
    jax.jit, static_argnums=0, static_argnames="kernels", donate_argnums=2
)
def _step(
    config,
    params,
    pools,
    last_tokens,
    seats,
    page_tables,
    lengths,
    rope,
    kernels=DEFAULT_KERNELS,
):
    token_ids = last_tokens.at[seats].get(mode="clip")
    return decode_step(
        config, params, token_ids, pools, page_tables, lengths, rope, kernels=kernels
    )


# A program of its own: greedy and sampled steps share the large one.
@functools.partial(jax.jit, donate_argnums=0)
def _choose(last_tokens, logits, seats, sampling, positions):
    sampled = sample(logits, sampling, positions)
    return last_tokens.at[seats].set(sampled.token_ids, mode="drop"), sampled


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sequence of a step.

    Attributes:
        seat: where its last token waits on the device.
        page_table: int32 [pages_per_sequence].
        length: tokens of context, the one to be computed included.
        position: of the token to be sampled in its conversation, of which the context
            may have lost some; None where it has not.
    """

    seat: int
    page_table: np.ndarray
    length: int
    sampling: SamplingParams
    position: int | None = None


class Decode:
    """Runs decode steps on one model and one device pool.

    Attributes:
        last_tokens: int32 [seats], the last token of the sequence in each seat.
    """

    def __init__(
        self,
        config: LlamaConfig,
        params: LlamaParams,
        rope: RopeTables,
        pool: DevicePool,
        *,
        num_seats: int,
        pages_per_sequence: int,
        kernels: Kernels = DEFAULT_KERNELS,
    ) -> None:
        self._config = config
        self._params = params
        self._rope = rope
        self._pool = pool
        self._kernels = kernels
        self.num_seats = num_seats
        self.pages_per_sequence = pages_per_sequence
        self.reset()

    def reset(self) -> None:
        """Forgets the last tokens; nothing may be decoding."""
        self.last_tokens = jnp.zeros(
            self.num_seats, jnp.int32, device=self._pool.device_sharding
        )

    @property
    def batch_sizes(self) -> list[int]:
        """Sizes of the compiled programs."""
        sizes = [_SMALLEST_BATCH]
        while sizes[-1] < self.num_seats:
            sizes.append(2 * sizes[-1])
        return sizes

    def run(self, rows: Sequence[Row], batch_size: int | None = None) -> Sampled:
        """Dispatches one step; results are padded to the batch size, rows in order."""
        size = batch_size or next(s for s in self.batch_sizes if s >= len(rows))
        # Fresh arrays every time: XLA on CPU may read NumPy memory after the call
        # returns.
        seats = np.full(size, self.num_seats, np.int32)
        lengths, positions = np.zeros(size, np.int32), np.zeros(size, np.int32)
        tables = np.zeros((size, self.pages_per_sequence), np.int32)
        for index, row in enumerate(rows):
            seats[index], lengths[index] = row.seat, row.length
            positions[index] = row.length if row.position is None else row.position
            tables[index] = row.page_table
        logits, self._pool.arrays[:] = _step(
            self._config,
            self._params,
            self._pool.arrays,
            self.last_tokens,
            seats,
            tables,
            lengths,
            self._rope,
            kernels=self._kernels,
        )
        sampling = sampling_batch([row.sampling for row in rows], size)
        self.last_tokens, sampled = _choose(
            self.last_tokens, logits, seats, sampling, positions
        )
        sampled.send()
        return sampled
