"""The prefill of one turn: pages arrive layer group by layer group while groups
compute.

Knows chunks, groups and their order. Does not know sessions, sampling parameters or
where a page was.
"""

import functools
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace

import jax
import numpy as np

from cachedattn_jax.engine.chunks import plan_chunks
from cachedattn_jax.engine.sampling import Sampled, SamplingBatch, sample
from cachedattn_jax.model.config import LlamaConfig
from cachedattn_jax.model.llama import LlamaParams, embed, unembed
from cachedattn_jax.model.paged import prefill_group
from cachedattn_jax.store.device_pool import DevicePool
from cachedattn_jax.store.inbound import Inbound
from cachedattn_jax.store.watcher import Watcher
from pallas_kernels.backends import DEFAULT_KERNELS, Kernels
from pallas_kernels.rope import RopeTables

# Layer groups that are dispatched and not yet computed while pages arrive. Each of them
# may keep its copy in device memory, so they are bounded; with only 2, an H200 waited
# for the host between layers of 0.5 ms.
_DISPATCH_AHEAD = 8

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
    """The prefill programs of one model on one device pool.

    Args:
        chunk_tokens: sizes of the compiled programs, in tokens.
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
    ) -> "PrefillRun":
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
        chunks = []
        for num_tokens, size in plan_chunks(len(token_ids), self.chunk_tokens):
            chunk = np.zeros((1, size), np.int32)
            chunk[0, :num_tokens] = token_ids[:num_tokens]
            token_ids = token_ids[num_tokens:]
            chunks.append(
                _Chunk(
                    num_tokens=num_tokens,
                    x=_embed(self._config, self._ends, chunk),
                    starts=np.asarray([start], np.int32),
                    lengths=np.asarray([start + num_tokens], np.int32),
                )
            )
            start += num_tokens
        return PrefillRun(
            self,
            chunks,
            page_table[None].copy(),
            inbound,
            read_ahead,
            is_preloading,
            on_group,
        )

    def compute(self, group: int, chunk: "_Chunk", page_tables: np.ndarray) -> None:
        """Dispatches one layer group over one chunk."""
        chunk.x, self._pool.arrays[group] = _group(
            self._config,
            self._groups[group],
            chunk.x,
            self._pool.arrays[group],
            page_tables,
            chunk.starts,
            chunk.lengths,
            self._rope,
            kernels=self._kernels,
        )

    def first_token(
        self,
        run: "PrefillRun",
        last_tokens: jax.Array,
        seat: int,
        sampling: SamplingBatch,
    ) -> tuple[jax.Array, Sampled]:
        """Dispatches the sampling of the token after a prefill.

        Args:
            last_tokens: int32 [seats], donated; where decode finds the sampled token.

        Returns:
            last_tokens with the sampled token at `seat`, and what was sampled.
        """
        chunk = run.chunks[-1]
        return _first_token(
            self._config,
            self._ends,
            last_tokens,
            chunk.x,
            np.int32(chunk.num_tokens - 1),
            np.asarray([seat], np.int32),
            sampling,
            chunk.lengths,
        )


@dataclass(eq=False, kw_only=True)
class _Chunk:
    """Tokens that go through a program together.

    Attributes:
        x: the hidden state after the groups dispatched so far, [1, size, hidden].
        starts, lengths: int32 [1], as the attention ops take them.
    """

    num_tokens: int
    x: jax.Array
    starts: np.ndarray
    lengths: np.ndarray


class PrefillRun:
    """One prefill under way.

    Groups follow each other, and within a group the chunks: so the computing of all
    chunks hides the loading of the next group, not only that of the first.

    Attributes:
        group: the next to be dispatched.
        computes: per group dispatched, when, and when it had computed; per prefill
            where no pages arrive.
    """

    def __init__(
        self,
        programs: Prefill,
        chunks: list[_Chunk],
        page_tables: np.ndarray,
        inbound: Inbound | None,
        read_ahead: int,
        is_preloading: bool,
        on_group: Callable[[int], None] | None,
    ) -> None:
        self.chunks = chunks
        self.group = 0
        self.computes: list[tuple[float, Future[float]]] = []
        self.installs: list[tuple[float, Future[float]]] = []
        self._programs = programs
        self._page_tables = page_tables
        self._inbound = inbound if inbound is not None and inbound.loads else None
        self._ahead = max(1, read_ahead)
        self._is_preloading = is_preloading
        self._on_group = on_group

    @property
    def is_dispatched(self) -> bool:
        return self.group == self._programs.num_groups

    @property
    def num_padded(self) -> int:
        """Tokens computed, padding included."""
        return sum(chunk.x.shape[1] for chunk in self.chunks)

    def needed(self, group: int) -> int:
        """The last layer group whose pages must be there before this one computes."""
        return group if self._is_preloading else self._programs.num_groups - 1

    def advance(self, *, is_gated: bool = False, until_s: float | None = None) -> bool:
        """Dispatches groups as long as their pages are there; whether it was all.

        Args:
            is_gated: a group is dispatched when its pages are on the device, so that
                others can use the device until then. Otherwise the device waits.
            until_s: when it stops waiting for pages, of the monotonic clock; None for
                when they are there.
        """
        while not self.is_dispatched:
            if not self._wait(is_gated, until_s):
                return False
            self._dispatch()
        return True

    def _wait(self, is_gated: bool, until_s: float | None) -> bool:
        inbound = self._inbound
        if inbound is None:
            return True
        needed = self.needed(self.group)
        is_gated = is_gated or not self._is_preloading
        is_there = inbound.has_arrived if is_gated else inbound.is_put
        if is_there(needed) and not inbound.has_failed:
            return True
        patience_s = None if until_s is None else max(0.0, until_s - time.monotonic())
        return inbound.wait(needed, patience_s, only_put=not is_gated)

    def _dispatch(self) -> None:
        group, inbound, programs = self.group, self._inbound, self._programs
        if inbound is not None:
            if len(self.computes) >= _DISPATCH_AHEAD:
                wait([self.computes[-_DISPATCH_AHEAD][1]])
            if programs.puts_first:
                inbound.put_through(group + 1 + self._ahead)
            started_s = time.monotonic()
            installs = inbound.install(group)
            self.installs.append((started_s, programs.watcher.watch(installs)))
        started_s = time.monotonic()
        for chunk in self.chunks:
            programs.compute(group, chunk, self._page_tables)
        if inbound is not None:
            if not programs.puts_first:
                inbound.put_through(group + 1 + self._ahead)
            done = programs.watcher.watch(self.chunks[-1].x)
            self.computes.append((started_s, done))
        elif group == 0:
            self._started_s = started_s
        self.group += 1
        if inbound is None and self.is_dispatched:
            done = programs.watcher.watch(self.chunks[-1].x)
            self.computes.append((self._started_s, done))
        if self._on_group is not None:
            self._on_group(group)
