"""The prefill of one turn: pages arrive layer group by layer group while groups
compute.

Knows chunks, groups and their order. Does not know sessions, sampling parameters or
where a page was.
"""

import functools
from dataclasses import replace

import jax
import numpy as np

from cachedattn_jax.engine.chunks import plan_chunks
from cachedattn_jax.engine.sampling import Sampled, SamplingBatch, sample
from cachedattn_jax.model.config import LlamaConfig
from cachedattn_jax.model.llama import LlamaParams, embed, unembed
from cachedattn_jax.model.paged import prefill_group
from cachedattn_jax.store.device_pool import DevicePool
from cachedattn_jax.store.lease import Load
from pallas_kernels.backends import DEFAULT_KERNELS, Kernels
from pallas_kernels.rope import RopeTables

# Groups whose copies to the device are under way ahead of the one that computes.
_READ_AHEAD = 2

_group = jax.jit(
    prefill_group, static_argnums=0, static_argnames="kernels", donate_argnums=3
)
_embed = jax.jit(embed, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _first_token(config, params, last_tokens, x, last, seat, sampling, position):
    """Samples from the hidden state of the last token; [1, new_tokens, hidden] in."""
    logits = unembed(config, params, jax.lax.dynamic_index_in_dim(x[0], last))
    sampled = sample(logits, sampling, position)
    return last_tokens.at[seat].set(sampled.token_ids, mode="drop"), sampled


class Prefill:
    """Runs prefills on one model and one device pool.

    Args:
        chunk_tokens: sizes of the compiled programs, in tokens.
        puts_first: whether a group's copy is started before or after the compute of the
            group it overlaps. CUDA: before, since a buffer allocated later waits for
            the compute. TPU: after, since the copy would delay the compute.
    """

    def __init__(
        self,
        config: LlamaConfig,
        params: LlamaParams,
        rope: RopeTables,
        pool: DevicePool,
        *,
        chunk_tokens: tuple[int, ...],
        puts_first: bool,
        kernels: Kernels = DEFAULT_KERNELS,
    ) -> None:
        self._config = config
        self._ends = replace(params, layers=())
        size = pool.layout.layers_per_group
        self._groups = [
            params.layers[start : start + size]
            for start in range(0, len(params.layers), size)
        ]
        self._rope = rope
        self._pool = pool
        self.chunk_tokens = chunk_tokens
        self._puts_first = puts_first
        self._kernels = kernels

    def run(
        self,
        token_ids: np.ndarray,
        start: int,
        loads: list[Load],
        page_table: np.ndarray,
        last_tokens: jax.Array,
        seat: int,
        sampling: SamplingBatch,
    ) -> tuple[jax.Array, Sampled, int]:
        """Dispatches a prefill; returns without waiting for it.

        Args:
            token_ids: int32, the tokens to compute.
            start: position of the first of them.
            loads: pages to install before the first group that needs them computes.
            page_table: int32 [pages_per_sequence].
            last_tokens: int32 [seats], donated; where decode finds the sampled token.

        Returns:
            last_tokens with the sampled token at `seat`, what was sampled, and the
            number of tokens computed, padding included.
        """
        num_padded = 0
        for num_tokens, size in plan_chunks(len(token_ids), self.chunk_tokens):
            chunk = np.zeros((1, size), np.int32)
            chunk[0, :num_tokens] = token_ids[:num_tokens]
            token_ids = token_ids[num_tokens:]
            x = self._chunk(chunk, start, start + num_tokens, page_table, loads)
            loads = []
            start += num_tokens
            num_padded += size
        last_tokens, sampled = _first_token(
            self._config,
            self._ends,
            last_tokens,
            x,
            np.int32(num_tokens - 1),
            np.asarray([seat], np.int32),
            sampling,
            np.asarray([start], np.int32),
        )
        return last_tokens, sampled, num_padded

    def _chunk(
        self,
        token_ids: np.ndarray,
        start: int,
        end: int,
        page_table: np.ndarray,
        loads: list[Load],
    ) -> jax.Array:
        """One chunk through all groups; pages are put ahead of their group."""
        starts, lengths = np.asarray([start], np.int32), np.asarray([end], np.int32)
        tables = page_table[None].copy()
        arrivals: dict[int, list[tuple[jax.Array, np.ndarray]]] = {}

        def put(group: int) -> None:
            if group < len(self._groups) and group not in arrivals:
                arrivals[group] = [
                    (self._pool.put(load.group(group)), load.slots) for load in loads
                ]

        for group in range(_READ_AHEAD):
            put(group)
        x = _embed(self._config, self._ends, token_ids)
        for group, layers in enumerate(self._groups):
            if self._puts_first:
                put(group + _READ_AHEAD)
            for pages, slots in arrivals.pop(group):
                self._pool.install(group, pages, slots)
            x, self._pool.arrays[group] = _group(
                self._config,
                layers,
                x,
                self._pool.arrays[group],
                tables,
                starts,
                lengths,
                self._rope,
                kernels=self._kernels,
            )
            if not self._puts_first:
                put(group + _READ_AHEAD)
        return x
