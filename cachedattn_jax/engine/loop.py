"""The serving loop: turns start, prefill, decode and end; their pages stay in the
store.

Knows the order of things. Does not know attention, budgets or queue discipline. The
thread that calls `step` is the one that dispatches all JAX work.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from cachedattn_jax.engine.cost_model import CostModel
from cachedattn_jax.engine.decode import Decode, Row
from cachedattn_jax.engine.engine_config import EngineConfig
from cachedattn_jax.engine.job import InFlight, Job
from cachedattn_jax.engine.prefill import Prefill
from cachedattn_jax.engine.sampling import sampling_batch
from cachedattn_jax.engine.scheduler import Scheduler
from cachedattn_jax.engine.staging import BadTurn, Staging
from cachedattn_jax.engine.turn import FinishReason, Turn
from cachedattn_jax.store.catalog import SessionRecord
from cachedattn_jax.store.page import chain_keys
from cachedattn_jax.store.placement import QueueView
from cachedattn_jax.store.tiered_store import TieredStore

# How long decoding pauses for the pages of the turn that is next. They often come
# within this (22 pages of 0.5 MiB from disk in 7 ms); a decode step would keep the turn
# longer.
_PATIENCE_S = 0.02


class Loop:
    """Advances turns step by step."""

    def __init__(
        self,
        config: EngineConfig,
        window: int,
        store: TieredStore,
        scheduler: Scheduler[Turn],
        cost_model: CostModel,
        prefill: Prefill,
        decode: Decode,
    ) -> None:
        self._config = config
        self._store = store
        self._timeline = store.timeline
        self._scheduler = scheduler
        self._cost_model = cost_model
        self._prefill = prefill
        self._decode = decode
        self._staging = Staging(config, window, store, scheduler, cost_model)
        self._free_seats = list(range(config.max_batch))
        self._prefilling: Job | None = None
        self._decoding: list[Job] = []
        self._in_flight: deque[InFlight] = deque()
        # The next turn, while it waits for slots that running turns hold: trying again
        # before one of them ends would drain the device at every step for nothing.
        self._blocked: Turn | None = None

    def step(self) -> None:
        """Advances every turn that can advance; the whole design in five calls."""
        self._look_ahead()
        self._start_next()
        self._prefill_groups()
        self._decode_batch()
        self._collect(leave=1)

    def stop(self) -> None:
        """Ends every turn as cancelled."""
        for turn in self._scheduler.running + self._scheduler.waiting:
            turn.cancel()
        self._collect(leave=0)
        self._end_cancelled()

    # ---- the five verbs of a step ----

    def _look_ahead(self) -> None:
        """Looks after copies under way, and begins those of the next turns."""
        self._end_cancelled()
        self._store.poll(QueueView(waiting=self._scheduler.upcoming()))
        with self._bad_turns_end():
            self._staging.look_ahead()

    def _start_next(self) -> None:
        """Gives a seat to the next turn whose pages are there, or about to come."""
        turn = self._scheduler.next()
        if self._prefilling is not None or turn is None or turn is self._blocked:
            return
        patience_s = 0.0
        if turn.times.started_s is None:
            # The turn starts on an idle device, or its prefill would be timed with a
            # step of others in it.
            self._collect(leave=0)
            turn.times.started_s = time.monotonic()
            patience_s = _PATIENCE_S
        job = None
        with self._bad_turns_end():
            job = self._staging.next(patience_s)
            if job is None and not self._decoding:
                job = self._staging.wait(turn, None)
        if job is not None:
            self._start(job)
        elif self._staging.is_blocked(turn) and not turn.is_finished:
            turn.times.started_s = None
            self._blocked = turn

    def _prefill_groups(self) -> None:
        """Dispatches the layer groups of the prefill whose pages have arrived."""
        job = self._prefilling
        if job is None:
            return
        with self._guard([job]):
            assert job.prefill is not None
            if self._store.forget_bad(job.lease):
                self._abandon_save(job)
                self._staging.renew(job)
                self._begin_prefill(job)
            # Until its pages come the others decode, and without others it waits.
            until_s = job.started_s + _PATIENCE_S if self._decoding else None
            is_gated = bool(self._decoding) or self._store.links.are_emulated
            if job.prefill.advance(is_gated=is_gated, until_s=until_s):
                self._sample_first(job)

    def _decode_batch(self) -> None:
        """Dispatches one step for every turn that still needs tokens."""
        jobs = [job for job in self._decoding if job.needs_tokens]
        if not jobs:
            return
        started = time.monotonic()
        with self._guard(jobs):
            sampled = self._decode.run(
                [
                    Row(
                        seat=job.seat,
                        page_table=job.page_table,
                        length=len(job.turn.prompt) + job.num_dispatched,
                        sampling=job.turn.request.sampling,
                    )
                    for job in jobs
                    if job.seat is not None
                ]
            )
            for job in jobs:
                job.num_dispatched += 1
            self._in_flight.append(
                InFlight(jobs=jobs, sampled=sampled, name="decode", start_s=started)
            )

    def _collect(self, *, leave: int) -> None:
        """Reads tokens of dispatched programs, except of the last `leave` of them.

        One step stays in flight, so the device computes while the host looks at tokens.
        """
        if not any(job.needs_tokens for job in self._decoding):
            leave = 0
        while len(self._in_flight) > leave:
            work = self._in_flight.popleft()
            token_ids, margins, now = [], [], 0.0
            with self._guard(work.jobs, is_device_lost=True):
                token_ids = np.asarray(work.sampled.token_ids).tolist()
                margins = np.asarray(work.sampled.margins).tolist()
                now = time.monotonic()
                if work.name == "decode":
                    self._timeline.add(
                        "decode", "compute", work.start_s, now, batch=len(work.jobs)
                    )
            rows = zip(work.jobs, token_ids, margins, strict=False)
            for job, token, margin in rows:
                if not job.turn.is_finished:
                    with self._guard([job]):
                        self._record(job, token, margin, now)

    # ---- parts of them ----

    def _start(self, job: Job) -> None:
        turn = job.turn
        self._collect(leave=0)
        job.started_s = time.monotonic()
        if turn.times.started_s is None:
            turn.times.started_s = job.started_s
        self._scheduler.start(turn)
        del self._staging.jobs[turn]
        job.seat = self._free_seats.pop()
        self._prefilling = job
        with self._guard([job]):
            self._begin_prefill(job)

    def _begin_prefill(self, job: Job) -> None:
        turn, lease, store = job.turn, job.lease, self._store
        turn.tokens_from = job.plan.tokens_from(lease)
        turn.decision = job.decision.choice
        turn.decision_reason = job.decision.reason
        if self._saves_meanwhile(job):
            step = store.layout.page_tokens
            first, last = -(-lease.cached_tokens // step), len(turn.prompt) // step
            pages = range(first, last)
            slots = lease.slots[first:last].tolist()
            job.save = store.saver.begin(pages, slots, job.name)
        job.prefill = self._prefill.begin(
            turn.prompt[lease.cached_tokens :],
            lease.cached_tokens,
            job.page_table,
            lease.inbound,
            read_ahead=job.read_ahead,
            is_preloading=self._config.is_preloading,
            on_group=lambda group: self._save_group(job, group),
        )
        turn.num_chunk_tokens = job.prefill.num_padded

    def _saves_meanwhile(self, job: Job) -> bool:
        is_reusing = self._config.reuse == "cached"
        return is_reusing and self._store.saves_meanwhile(job.turn.turn_index)

    def _save_group(self, job: Job, group: int) -> None:
        if job.save is None:
            return
        try:
            self._store.saver.save_group(job.save, group)
        except Exception:  # the turn does not need it
            self._store.counters["save_failures"] += 1
            self._abandon_save(job)

    def _abandon_save(self, job: Job) -> None:
        if job.save is not None:
            self._store.saver.abandon(job.save)
            job.save = None

    def _sample_first(self, job: Job) -> None:
        """The prefill is dispatched: its pages can be found, its first token comes."""
        assert job.prefill is not None and job.seat is not None
        self._decode.last_tokens, sampled = self._prefill.first_token(
            job.prefill,
            self._decode.last_tokens,
            job.seat,
            sampling_batch([job.turn.request.sampling], 1),
        )
        job.num_dispatched = 1
        if self._config.reuse == "cached":
            self._publish(job, job.keys)
        self._prefilling = None
        self._decoding.append(job)
        start_s = time.monotonic()
        self._in_flight.append(
            InFlight(jobs=[job], sampled=sampled, name="prefill", start_s=start_s)
        )

    def _publish(self, job: Job, keys: list[bytes]) -> None:
        store = self._store
        store.publish(job.lease, keys, job.token_ids, job.num_published)
        job.keys, job.num_published = keys, len(keys)
        if job.save is not None:
            store.saver.finish(job.save, job.lease.entries)
            job.turn.bytes_device_to_host += job.save.num_bytes
            job.save = None
        num_pages = store.save_soon(job.lease, job.turn.turn_index, job.name)
        job.turn.bytes_device_to_host += num_pages * store.layout.page_bytes

    def _record(self, job: Job, token: int, margin: float, now: float) -> None:
        """Takes note of a reply token; ends the turn if it was the last."""
        turn = job.turn
        turn.reply.append(token)
        turn.margins.append(margin)
        if turn.times.first_token_s is None:
            turn.times.first_token_s = now
            job.note_prefill(self._timeline)
            job.observe(self._cost_model)
        if token in turn.request.stop_token_ids:
            self._finish(job, "stop")
        elif len(turn.reply) == job.plan.max_tokens:
            is_full = job.plan.max_tokens < turn.request.max_tokens
            self._finish(job, "window" if is_full else "length")
        elif self._saves_meanwhile(job):
            # The token just sampled has no keys and values yet.
            num_cached = len(turn.prompt) + len(turn.reply) - 1
            if num_cached % self._store.layout.page_tokens == 0:
                cached = job.token_ids[:-1]
                layout, salt = self._store.layout, job.plan.salt
                self._publish(job, chain_keys(layout, salt, cached, job.keys))

    def _finish(self, job: Job, reason: FinishReason) -> None:
        """Ends a turn that has a reply: its tokens and pages become the session's."""
        turn = job.turn
        keys, tail = job.plan.final_pages(self._store.layout, job.token_ids, job.keys)
        record = SessionRecord(
            session_id=turn.request.session_id,
            tenant=turn.request.tenant,
            token_ids=job.token_ids,
            num_turns=turn.turn_index + 1,
            used_at=time.time(),
            page_keys=tuple(keys),
        )
        if self._config.reuse == "cached":
            num_pages = self._store.commit(job.lease, keys, tail, record, job.name)
            turn.bytes_device_to_host += num_pages * self._store.layout.page_bytes
        else:
            self._store.catalog.commit(record)
        self._let_go(job)
        self._end(turn, reason)

    def _let_go(self, job: Job) -> None:
        """Gives back the pages and the seat of a turn, whatever became of it."""
        self._abandon_save(job)
        self._store.release(job.lease)
        self._blocked = None
        if job.seat is not None:
            self._free_seats.append(job.seat)
            job.seat = None
        if job is self._prefilling:
            self._prefilling = None
        if job in self._decoding:
            self._decoding.remove(job)

    def _end(
        self, turn: Turn, reason: FinishReason, error: Exception | None = None
    ) -> None:
        turn.times.finished_s = time.monotonic()
        turn.error = error
        turn.finish_reason = reason
        self._scheduler.finish(turn)

    def _end_cancelled(self) -> None:
        for turn in [t for t in self._scheduler.waiting if t.is_cancel_requested]:
            self._staging.drop(turn)
            self._end(turn, "cancelled")
        running = [*self._decoding, *filter(None, [self._prefilling])]
        for job in [job for job in running if job.turn.is_cancel_requested]:
            with self._guard([job]):
                if job.turn.reply:
                    self._finish(job, "cancelled")
                elif job is self._prefilling:
                    self._let_go(job)
                    self._end(job.turn, "cancelled")

    @contextmanager
    def _bad_turns_end(self) -> Iterator[None]:
        """Ends a waiting turn that cannot be served; the others stay as they are."""
        try:
            yield
        except BadTurn as bad:
            self._staging.drop(bad.turn)
            self._end(bad.turn, "error", bad.error)

    @contextmanager
    def _guard(
        self, jobs: list[Job], *, is_device_lost: bool = False
    ) -> Iterator[None]:
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
                rest = [*self._decoding, *filter(None, [self._prefilling])]
                jobs = jobs + [job for job in rest if job not in jobs]
                self._in_flight.clear()
            for job in [job for job in jobs if not job.turn.is_finished]:
                self._let_go(job)
                self._end(job.turn, "error", error)
            if is_device_lost:
                for turn in list(self._staging.jobs):
                    self._staging.drop(turn)
                self._store.forget_device()
                self._decode.reset()
