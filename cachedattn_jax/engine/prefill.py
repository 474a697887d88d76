"""The prefill of one turn: pages arrive layer group by layer group while groups
compute.

Knows chunks, groups and their order. Does not know sessions, sampling parameters or
where a page was.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from cachedattn_jax.engine.chunks import CALL_TOKENS, plan_chunks
from cachedattn_jax.engine.prefill_run import Chunk, PrefillRun
from cachedattn_jax.engine.rewrite import Rewrite
from cachedattn_jax.engine.sampling import Sampled, SamplingBatch, sample
from cachedattn_jax.model.config import LlamaConfig
from cachedattn_jax.model.llama import LlamaParams, embed, unembed
from cachedattn_jax.model.paged import prefill_group
from cachedattn_jax.store.device_pool import DevicePool
from cachedattn_jax.store.inbound import Inbound
from cachedattn_jax.store.watcher import Watcher
from pallas_kernels.backends import DEFAULT_KERNELS, Kernels
from pallas_kernels.prefill_attention import FRESH_TOKENS
from pallas_kernels.rope import RopeTables

_group = jax.jit(
    prefill_group,
    static_argnums=0,
    static_argnames=("has_history", "kernels"),
    donate_argnums=3,
)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _begin(config, params, numbers, size):
    """The hidden states of a chunk, and where it is: all from one array of numbers,
    since each that goes to the device takes the host a tenth of a millisecond."""
    token_ids, table, ends = jnp.split(numbers, (size, len(numbers) - 2))
    x = embed(config, params, token_ids[None])
    return x, (table[None], ends[:1], ends[1:])


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _first_token(config, params, last_tokens, x, numbers, sampling):
    """Samples from the hidden state of the last token; [1, new_tokens, hidden] in.

    Args:
        numbers: int32, place of that token in x, seat, and position of the next one.
    """
    last, seat, position = jnp.split(numbers, 3)
    logits = unembed(config, params, jax.lax.dynamic_index_in_dim(x[0], last[0]))
    sampled = sample(logits, sampling, position)
    return last_tokens.at[seat].set(sampled.token_ids, mode="drop"), sampled


def has_history(num_tokens: int, start: int) -> bool:
    """Whether a chunk goes through the program that reads what is before it.

    All short ones do: it would not pay to compile another.
    """
    return num_tokens < FRESH_TOKENS or start > 0


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Tokens that are computed with one page table.

    Attributes:
        token_ids: int32.
        start: position of the first of them.
        page_table: int32 [pages_per_sequence].
        rewrite: what is moved before they are computed.
    """

    token_ids: np.ndarray
    start: int
    page_table: np.ndarray
    rewrite: Rewrite | None = None


class Prefill:
    """The prefill programs of one model on one device pool.

    Args:
        chunk_tokens: sizes of the compiled programs, in tokens.
        call_tokens: see `plan_chunks`.
        puts_first: whether a group's copy is started before or after the compute of the
            group it overlaps. CUDA: before, since a buffer allocated later waits for
            the compute. TPU: after, since the copy would delay the compute.
        watcher: of the compute stream.
    """

    def __init__(
        self,
        config: LlamaConfig,
        params: LlamaParams,
        rope: RopeTables,
        pool: DevicePool,
        *,
        chunk_tokens: tuple[int, ...],
        call_tokens: int = CALL_TOKENS,
        puts_first: bool,
        watcher: Watcher,
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
        self._call_tokens = call_tokens
        self.puts_first = puts_first
        self.watcher = watcher
        self._kernels = kernels

    @property
    def num_groups(self) -> int:
        return len(self._groups)

    def begin(
        self,
        token_ids: np.ndarray,
        start: int,
        page_table: np.ndarray,
        inbound: Inbound | None = None,
        *,
        read_ahead: int = 0,
        is_preloading: bool = True,
        on_group: Callable[[int], None] | None = None,
    ) -> PrefillRun:
        """A prefill whose groups are yet to be dispatched.

        Args:
            token_ids: int32, the tokens to compute.
            start: position of the first of them.
            page_table: int32 [pages_per_sequence].
            inbound: pages to install before the group that needs them computes.
            read_ahead: groups whose pages may be copied ahead of the one that computes.
            is_preloading: False waits for all pages before the first group.
            on_group: called with each group when its programs are dispatched.
        """
        segment = Segment(token_ids=token_ids, start=start, page_table=page_table)
        return self.begin_segments(
            [segment],
            inbound,
            read_ahead=read_ahead,
            is_preloading=is_preloading,
            on_group=on_group,
        )

    def begin_segments(
        self,
        segments: Sequence[Segment],
        inbound: Inbound | None = None,
        *,
        read_ahead: int = 0,
        is_preloading: bool = True,
        on_group: Callable[[int], None] | None = None,
    ) -> PrefillRun:
        """The same where the page table changes on the way; see `begin`."""
        steps: list[Chunk | Rewrite] = []
        for segment in segments:
            if segment.rewrite is not None:
                steps.append(segment.rewrite)
            steps += self._chunks(segment)
        return PrefillRun(self, steps, inbound, read_ahead, is_preloading, on_group)

    def _chunks(self, segment: Segment) -> Iterator[Chunk]:
        token_ids, start = segment.token_ids, segment.start
        for num_tokens, size in plan_chunks(
            len(token_ids), self.chunk_tokens, self._call_tokens
        ):
            padding = np.zeros(size - num_tokens, np.int32)
            ends = np.asarray([start, start + num_tokens], np.int32)
            numbers = np.concatenate(
                [token_ids[:num_tokens], padding, segment.page_table, ends]
            )
            x, where = _begin(self._config, self._ends, numbers, size)
            yield Chunk(num_tokens=num_tokens, x=x, start=start, where=where)
            token_ids, start = token_ids[num_tokens:], start + num_tokens

    def compute(self, group: int, step: Chunk | Rewrite) -> None:
        """Dispatches one step in one layer group."""
        if isinstance(step, Rewrite):
            step.run(self._pool, group, self._config.dtype)
            return
        step.x, self._pool.arrays[group] = _group(
            self._config,
            self._groups[group],
            step.x,
            self._pool.arrays[group],
            *step.where,
            self._rope,
            has_history=has_history(step.x.shape[1], step.start),
            kernels=self._kernels,
        )

    def first_token(
        self,
        run: PrefillRun,
        last_tokens: jax.Array,
        seat: int,
        sampling: SamplingBatch,
        position: int | None = None,
    ) -> tuple[jax.Array, Sampled]:
        """Dispatches the sampling of the token after a prefill.

        Args:
            last_tokens: int32 [seats], donated; where decode finds the sampled token.
            position: of the token in its conversation, if not the one in the context.

        Returns:
            last_tokens with the sampled token at `seat`, and what was sampled.
        """
        chunk = run.chunks[-1]
        if position is None:
            position = chunk.start + chunk.num_tokens
        last_tokens, sampled = _first_token(
            self._config,
            self._ends,
            last_tokens,
            chunk.x,
            np.asarray([chunk.num_tokens - 1, seat, position], np.int32),
            sampling,
        )
        sampled.send()
        return last_tokens, sampled
