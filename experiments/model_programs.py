"""The programs of one model on a pool of random pages, and how long they take.

Knows programs as the engine runs them. Does not know ceilings or claims.
"""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from cachedattn_jax.engine.decode import Decode, Row
from cachedattn_jax.engine.prefill import Prefill
from cachedattn_jax.engine.request import SamplingParams
from cachedattn_jax.engine.sampling import sampling_batch
from cachedattn_jax.model.config import LlamaConfig
from cachedattn_jax.model.llama import init_params
from cachedattn_jax.store.device_pool import DevicePool
from cachedattn_jax.store.layout import Layout
from cachedattn_jax.store.watcher import Watcher
from pallas_kernels.rope import rope_tables

_STEPS = 16  # decode steps that are dispatched before the wait


class ModelPrograms:
    """The programs of one model on a pool of random pages."""

    def __init__(
        self,
        config: LlamaConfig,
        page_tokens,
        layers_per_group,
        tokens,
        sizes,
        seats,
        seed,
    ) -> None:
        self.config, params = config, init_params(config, seed)
        self.weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        layout = Layout(
            num_layers=config.num_layers,
            layers_per_group=layers_per_group,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            page_tokens=page_tokens,
            dtype=config.dtype,
            rope="",
            weights="",
        )
        self.num_pages = layout.num_pages(config.window)
        # Room for every sequence of the largest batch and a page more for each.
        num_slots = max(layout.num_pages(tokens) + seats, self.num_pages)
        self.pool = DevicePool(layout, num_slots, jax.devices()[0])
        self._fill(seed)
        rope = rope_tables(
            config.inverse_frequencies(),
            page_tokens=page_tokens,
            num_pages=self.num_pages,
        )
        # All in one place, as the engine has it: else programs are compiled twice.
        params, rope = jax.device_put((params, rope), self.pool.device_sharding)
        self.watcher = Watcher("compute")
        self.prefill = Prefill(
            config,
            params,
            rope,
            self.pool,
            chunk_tokens=sizes,
            puts_first=True,
            watcher=self.watcher,
        )
        self.decode = Decode(
            config,
            params,
            rope,
            self.pool,
            num_seats=seats,
            pages_per_sequence=self.num_pages,
        )
        self._rng = np.random.default_rng(seed)

    def _fill(self, seed: int) -> None:
        """Random keys and values: products of zeros take less time."""
        dtype = self.pool.dtype

        @jax.jit
        def draw(key):
            shape = (self.pool.num_slots, *self.pool.layout.group_shape)
            if dtype == jnp.uint16:  # the storage of bfloat16 on CPU
                drawn = jax.random.normal(key, shape, jnp.bfloat16)
                return jax.lax.bitcast_convert_type(drawn, dtype)
            return jax.random.normal(key, shape, dtype)

        for group in range(len(self.pool.arrays)):
            self.pool.arrays[group].delete()
            key = jax.random.key(seed + group)
            drawn = jax.device_put(draw(key), self.pool.device_sharding)
            self.pool.arrays[group] = drawn

    def close(self) -> None:
        self.watcher.close()
        self.pool.arrays.clear()

    def time_prefill(self, new: int, history: int, repeats: int) -> dict:
        """Seconds of a prefill alone, and of its dispatch."""
        table = np.arange(self.num_pages, dtype=np.int32) % self.pool.num_slots
        tokens = self._rng.integers(1, self.config.vocab_size, new).astype(np.int32)

        def once() -> tuple[float, float]:
            started = time.perf_counter()
            run = self.prefill.begin(tokens, history, table)
            run.advance()
            self.decode.last_tokens, _ = self.prefill.first_token(
                run, self.decode.last_tokens, 0, sampling_batch([], 1)
            )
            dispatched = time.perf_counter() - started
            jax.block_until_ready((self.pool.arrays, self.decode.last_tokens))
            return time.perf_counter() - started, dispatched

        seconds, dispatch = _medians(once, repeats)
        return {
            "new": new,
            "history": history,
            "seconds": seconds,
            "dispatch_s": dispatch,
            "dispatch_s_per_group": dispatch / self.prefill.num_groups,
            "flops": prefill_flops(self.config, new, history),
            "tokens_s": new / seconds,
        }

    def time_decode(self, batch: int, context: int, repeats: int) -> dict:
        """Seconds of a step in a row of steps, alone, and of its dispatch."""
        per_row = self.pool.layout.num_pages(context)
        slots = self._rng.permutation(self.pool.num_slots)[: batch * per_row]
        rows = []
        for seat, pages in enumerate(slots.reshape(batch, per_row)):
            table = np.zeros(self.num_pages, np.int32)
            table[:per_row] = pages
            rows.append(
                Row(
                    seat=seat,
                    page_table=table,
                    length=context,
                    sampling=SamplingParams(),
                )
            )

        def steps(count: int) -> tuple[float, float]:
            started = time.perf_counter()
            for _ in range(count):
                self.decode.run(rows, batch)
            dispatched = time.perf_counter() - started
            jax.block_until_ready((self.pool.arrays, self.decode.last_tokens))
            return (time.perf_counter() - started) / count, dispatched / count

        alone, dispatch = _medians(lambda: steps(1), repeats)
        seconds, _ = _medians(lambda: steps(_STEPS), repeats)
        kv = 2 * self.config.num_layers * self.config.num_kv_heads
        kv_bytes = kv * self.config.head_dim * jnp.dtype(self.config.dtype).itemsize
        # Of the embedding a step reads a row a token.
        embedding = 0 if self.config.tie_embeddings else self.config.vocab_size
        embedding_bytes = embedding * self.config.hidden_size * 2
        return {
            "batch": batch,
            "context": context,
            "seconds": seconds,
            "alone_s": alone,
            "dispatch_s": dispatch,
            "bytes": self.weight_bytes - embedding_bytes + batch * context * kv_bytes,
            "tokens_s": batch / seconds,
        }


def prefill_flops(config: LlamaConfig, new: int, history: int) -> float:
    """Operations of the layers, causal attention included, and of one row of logits."""
    ends = config.vocab_size * config.hidden_size
    layers = config.num_parameters - ends * (1 if config.tie_embeddings else 2)
    pairs = new * history + new * (new + 1) / 2
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * pairs
    return 2.0 * layers * new + attention + 2.0 * ends


def _medians(
    once: Callable[[], tuple[float, float]], repeats: int
) -> tuple[float, float]:
    once()  # compiles
    once()
    first, second = zip(*[once() for _ in range(repeats)], strict=True)
    return statistics.median(first), statistics.median(second)
