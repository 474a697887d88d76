"""How turns end: with a reply, cancelled, or by an error that ends only them.

Knows what a turn leaves behind. Does not know how it came this far.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from cachedattn_jax.engine.decode import Decode
from cachedattn_jax.engine.engine_config import EngineConfig
from cachedattn_jax.engine.job import Job
from cachedattn_jax.engine.running import Running
from cachedattn_jax.engine.scheduler import Scheduler
from cachedattn_jax.engine.staging import BadTurn, Staging
from cachedattn_jax.engine.totals import Totals
from cachedattn_jax.engine.turn import FinishReason, Turn
from cachedattn_jax.store.catalog import SessionRecord
from cachedattn_jax.store.tiered_store import TieredStore


class Ending:
    """Ends turns; afterwards they hold nothing.

    Attributes:
        totals: of all turns that have ended.
    """

    def __init__(
        self,
        config: EngineConfig,
        store: TieredStore,
        scheduler: Scheduler[Turn],
        staging: Staging,
        running: Running,
        decode: Decode,
    ) -> None:
        self.totals = Totals()
        self._config = config
        self._store = store
        self._scheduler = scheduler
        self._staging = staging
        self._running = running
        self._decode = decode

    def finish(self, job: Job, reason: FinishReason) -> None:
        """Ends a turn that has a reply: its tokens and pages become the session's."""
        turn = job.turn
        job.follow()
        record = SessionRecord(
            session_id=turn.request.session_id,
            tenant=turn.request.tenant,
            token_ids=job.token_ids,
            num_turns=turn.turn_index + 1,
            used_at=time.time(),
            truncations=job.truncations[: job.chain.num_truncations],
            is_pinned=self._store.sessions.is_pinned(
                turn.request.tenant, turn.request.session_id
            ),
            chain=job.chain,
        )
        if self._config.reuse == "cached":
            num_pages, turn.stored = self._store.commit(
                job.lease,
                job.unpublished(),
                job.tail(),
                record,
                job.name,
                at_once=self._running.jobs == [job],
            )
            turn.bytes_device_to_host += num_pages * self._store.layout.page_bytes
        else:
            turn.stored = self._store.catalog.commit(record)
        self.let_go(job)
        self.end(turn, reason)

    def let_go(self, job: Job) -> None:
        """Gives back the pages and the seat of a turn, whatever became of it."""
        job.abandon_save()
        self._store.leases.release(job.lease)
        self._running.leave(job)

    def end(
        self, turn: Turn, reason: FinishReason, error: Exception | None = None
    ) -> None:
        turn.times.finished_s = time.monotonic()
        turn.error = error
        turn.finish_reason = reason
        self.totals.note(turn)
        ticket = self._scheduler.ticket(turn)
        self._scheduler.finish(turn)
        if ticket is not None:
            now = turn.times.finished_s
            self._store.placement.unqueued(turn.session, ticket, now)
        else:
            self._rest(turn, turn.times.finished_s)

    def _rest(self, turn: Turn, now: float) -> None:
        store, request = self._store, turn.request
        record = store.catalog.known(request.tenant, request.session_id)
        num_tokens = 0 if record is None else record.cached_length
        store.placement.ended(
            turn.session,
            now,
            num_turns=0 if record is None else record.num_turns,
            num_tokens=num_tokens,
            kv_bytes=store.layout.num_pages(num_tokens) * store.layout.page_bytes,
        )

    def end_cancelled(self) -> None:
        for turn in [t for t in self._scheduler.waiting if t.is_cancel_requested]:
            self._staging.drop(turn)
            self.end(turn, "cancelled")
        for job in [j for j in self._running.jobs if j.turn.is_cancel_requested]:
            with self.guard([job]):
                if job.turn.reply:
                    self.finish(job, "cancelled")
                elif job is self._running.prefilling:
                    self.let_go(job)
                    self.end(job.turn, "cancelled")

    @contextmanager
    def bad_turns(self) -> Iterator[None]:
        """Ends a waiting turn that cannot be served; the others stay as they are."""
        try:
            yield
        except BadTurn as bad:
            self._staging.drop(bad.turn)
            self.end(bad.turn, "error", bad.error)

    @contextmanager
    def guard(self, jobs: list[Job], *, is_device_lost: bool = False) -> Iterator[None]:
        """Ends the turns of a program that failed, and only those.

        A donating call that raises may take a pool with it; then every running turn
        ends and the pages that were on the device count as lost.

        Args:
            is_device_lost: whether it is known to have, since results are errors.
        """
        try:
            yield
        except Exception as error:
            is_device_lost = is_device_lost or self._store.pool.is_lost
            if is_device_lost:
                rest = self._running.jobs
                jobs = jobs + [job for job in rest if job not in jobs]
                self._running.in_flight.clear()
            for job in [job for job in jobs if not job.turn.is_finished]:
                self.let_go(job)
                self.end(job.turn, "error", error)
            if is_device_lost:
                for turn in list(self._staging.jobs):
                    self._staging.drop(turn)
                self._store.forget_device()
                self._decode.reset()
