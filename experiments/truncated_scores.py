"""Logits of a model over a text that outgrows its window, under a truncation policy.

Knows texts, truncations and pages. Runs the prefill programs of the engine, whose page
table loses what was dropped. Does not know sessions or what the logits are used for.
"""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np

from cachedattn_jax.engine.prefill import Prefill, Segment
from cachedattn_jax.engine.rewrite import plan_rewrite
from cachedattn_jax.engine.truncation import TruncationConfig, plan_truncations
from cachedattn_jax.model.config import LlamaConfig
from cachedattn_jax.model.llama import LlamaParams, unembed
from cachedattn_jax.store.device_pool import DevicePool
from cachedattn_jax.store.layout import Layout
from cachedattn_jax.store.truncation import Context, Truncation
from cachedattn_jax.store.watcher import Watcher
from pallas_kernels.rope import rope_tables


class Scorer:
    """One model and pages for one window of it."""

    def __init__(
        self, config: LlamaConfig, params: LlamaParams, *, page_tokens: int = 16
    ) -> None:
        self.config = config
        self.page_tokens = page_tokens
        self._params = params
        layout = Layout(
            num_layers=config.num_layers,
            layers_per_group=1,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            page_tokens=page_tokens,
            dtype=config.dtype,
            rope="",
            weights="",
        )
        self._num_pages = layout.num_pages(config.window)
        self._pool = DevicePool(layout, self._num_pages, jax.devices()[0])
        rope = rope_tables(
            config.inverse_frequencies(),
            page_tokens=page_tokens,
            num_pages=self._num_pages,
        )
        sizes = {page_tokens, min(4 * page_tokens, config.window), config.window}
        self._watcher = Watcher("scores")
        self._prefill = Prefill(
            config,
            params,
            jax.device_put(rope, self._pool.device_sharding),
            self._pool,
            chunk_tokens=tuple(sorted(sizes)),
            puts_first=True,
            watcher=self._watcher,
        )
        self._unembed = jax.jit(unembed, static_argnums=0)

    def close(self) -> None:
        self._watcher.close()

    def logits(self, token_ids: np.ndarray, policy: TruncationConfig) -> np.ndarray:
        """float32 [tokens, vocab], each token computed in the context that it has then.

        Tokens that a recomputing policy computes again keep what they gave first.
        """
        truncations = plan_truncations(
            _one_after_the_other(policy),
            self.config.window,
            self.page_tokens,
            (),
            Context(),
            0,
            len(token_ids),
        )
        found = np.zeros((len(token_ids), self.config.vocab_size), np.float32)
        pieces = list(
            self._pieces(np.asarray(token_ids, np.int32), truncations, policy)
        )
        run = self._prefill.begin_segments([segment for segment, _ in pieces])
        run.advance()
        places = [place for _, piece in pieces for place in piece]
        start = 0
        for chunk in run.chunks:
            of_chunk = places[start : start + chunk.num_tokens]
            logits = np.asarray(self._unembed(self.config, self._params, chunk.x[0]))
            for place, row in zip(of_chunk, logits[: chunk.num_tokens], strict=True):
                if place is not None:
                    found[place] = row
            start += chunk.num_tokens
        return found

    def _pieces(
        self,
        token_ids: np.ndarray,
        truncations: tuple[Truncation, ...],
        policy: TruncationConfig,
    ) -> Iterator[tuple[Segment, list[int | None]]]:
        """What is computed, and whose logits it gives, None for those of before."""
        table = np.arange(self._num_pages, dtype=np.int32)
        context, position, rewrite = Context(), 0, None
        for truncation in (*truncations, None):
            at = len(token_ids) if truncation is None else truncation.at
            places = context.tokens(position, context.position(at))
            segment = Segment(
                token_ids=token_ids[places],
                start=position,
                page_table=table.copy(),
                rewrite=rewrite,
            )
            yield segment, places.tolist()
            if truncation is None:
                return
            ((start, stop),) = truncation.dropped
            before, old = table.copy(), context
            table = _without(table, start // self.page_tokens, stop // self.page_tokens)
            context = context.without(truncation.dropped)
            position, rewrite = context.position(at), None
            if policy.computes_anew:
                again = context.tokens(0, position)
                segment = Segment(
                    token_ids=token_ids[again], start=0, page_table=table.copy()
                )
                yield segment, [None] * len(again)
            elif policy.policy == "naive":
                rewrite = plan_rewrite(
                    dataclasses.replace(truncation, method="naive"),
                    old,
                    (before, table.copy()),
                    page_tokens=self.page_tokens,
                    num_slots=self._pool.num_slots,
                    inverse_frequencies=self.config.inverse_frequencies(),
                )


def _one_after_the_other(policy: TruncationConfig) -> TruncationConfig:
    """All policies drop the same pages at the same places, so that they compare."""
    return dataclasses.replace(policy, policy="truncate_pages")


def _without(table: np.ndarray, start: int, stop: int) -> np.ndarray:
    return np.concatenate([table[:start], table[stop:], table[start:stop]])
