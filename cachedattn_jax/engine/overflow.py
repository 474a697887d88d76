"""Running turns that reach the window: what is dropped, and how they go on.

Knows leases and page tables. Does not know how tokens are computed. Paper, section 3.4:
with positions that are not stored, a truncation is a change of the page table.
"""

from collections.abc import Callable

import numpy as np

from cachedattn_jax.engine.job import Job
from cachedattn_jax.engine.plan import Piece
from cachedattn_jax.engine.prefill import Segment
from cachedattn_jax.engine.rewrite import Rewrite, plan_rewrite
from cachedattn_jax.engine.staging import NoSlots
from cachedattn_jax.engine.truncation import TruncationConfig, truncate_full
from cachedattn_jax.store.chain import first_rewritten
from cachedattn_jax.store.tiered_store import TieredStore
from cachedattn_jax.store.truncation import Context, Truncation, context_after


class Overflow:
    """Truncates the contexts of turns that hold pages."""

    def __init__(
        self,
        config: TruncationConfig,
        window: int,
        store: TieredStore,
        inverse_frequencies: np.ndarray,
        dtype: str,
    ) -> None:
        self._config = config
        self._window = window
        self._store = store
        self._inverse_frequencies = inverse_frequencies
        self._dtype = dtype

    def is_full(self, job: Job) -> bool:
        """Whether the next token of a reply has no place in the window."""
        return job.context_tokens > self._window

    def next(self, job: Job) -> Truncation:
        """What makes room for the next token of a reply."""
        step, at = self._store.layout.page_tokens, job.num_tokens - 1
        return truncate_full(self._config, self._window, step, job.context, at)

    def has_room(self, job: Job) -> bool:
        """Whether a prefill that truncates on its way finds the slots it may need."""
        return not job.plan.truncates_meanwhile or self._store.leases.can_own(job.lease)

    def make_room(self, job: Job, settle: Callable[[], None]) -> None:
        """Drops what a running turn has no place for in the window any more.

        It goes on at once: no token is awaited. Where what is left has to be computed
        anew, it is only noted that it overflowed; where running turns hold slots that
        are needed in place of shared ones, that it is paused.

        Args:
            settle: waits for all tokens under way, for a policy that needs them.
        """
        if self._config.computes_anew:
            job.is_overflowed = True
            return
        if self._config.policy == "naive":
            settle()  # pages get other keys, which are made of tokens
        if job.turn.is_finished:
            return
        truncation = self.next(job)
        was_paused, job.is_paused = job.is_paused, False
        try:
            rewrite = self._apply(job, truncation, job.context)
        except NoSlots:
            self._store.counters["truncations_paused"] += not was_paused
            job.is_paused = True
            return
        self._store.leases.forget_dropped(job.lease)
        job.truncate(truncation)
        self._store.counters["truncations"] += 1
        if rewrite is not None:
            for group in range(self._store.layout.num_groups):
                rewrite.run(self._store.pool, group, self._dtype)
            job.follow_rewrite()

    def segments(self, job: Job) -> list[Segment]:
        """What a prefill computes, with the page table that each piece has.

        Raises:
            NoSlots: running turns hold slots that are needed.
        """
        segments = []
        number = job.plan.stored.num_truncations
        for piece in job.plan.pieces(job.lease.cached_tokens):
            rewrite = None
            if piece.truncation is not None:
                context = context_after(job.truncations[:number])
                rewrite = self._apply(job, piece.truncation, context)
                number += 1
            segments.append(self._segment(job, piece, rewrite))
        return [s for s in segments if len(s.token_ids) or s.rewrite is not None]

    def _segment(self, job: Job, piece: Piece, rewrite: Rewrite | None) -> Segment:
        return Segment(
            token_ids=piece.token_ids,
            start=piece.start,
            page_table=job.page_table.copy(),
            rewrite=rewrite,
        )

    def _apply(
        self, job: Job, truncation: Truncation, context: Context
    ) -> Rewrite | None:
        """Changes lease and page table; what must be moved for that, if anything."""
        lease, step = job.lease, self._store.layout.page_tokens
        num_held = -(-context.position(truncation.at) // step)
        before = job.page_table.copy()
        changed = True
        if truncation.rewrites_pages:
            rewritten = range(first_rewritten(truncation, step), num_held)
            changed = self._store.leases.own(lease, rewritten)
        if truncation.method != "repack":
            ((start, stop),) = truncation.dropped
            pages = range(start // step, stop // step)
            changed = changed and self._store.leases.drop(lease, pages)
        if not changed:
            raise NoSlots("running turns hold all slots that a truncation needs")
        job.page_table[: len(lease.slots)] = lease.slots
        if not truncation.rewrites_pages:
            return None
        return plan_rewrite(
            truncation,
            context,
            (before, job.page_table.copy()),
            page_tokens=step,
            num_slots=self._store.pool.num_slots,
            inverse_frequencies=self._inverse_frequencies,
        )
