"""The serving loop: turns start, prefill, decode and end; their pages stay in the
store.

Knows the order of things. Does not know attention, budgets or queue discipline. The
thread that calls `step` is the one that dispatches all JAX work.
"""

import time

import numpy as np

from cachedattn_jax.engine.cost_model import CostModel
from cachedattn_jax.engine.decode import Decode, Row
from cachedattn_jax.engine.ending import Ending
from cachedattn_jax.engine.engine_config import EngineConfig
from cachedattn_jax.engine.job import InFlight, Job
from cachedattn_jax.engine.overflow import Overflow
from cachedattn_jax.engine.prefill import Prefill
from cachedattn_jax.engine.publisher import Publisher
from cachedattn_jax.engine.running import Running
from cachedattn_jax.engine.sampling import sampling_batch
from cachedattn_jax.engine.scheduler import Scheduler
from cachedattn_jax.engine.staging import Staging
from cachedattn_jax.engine.totals import Totals
from cachedattn_jax.engine.turn import Turn
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
        overflow: Overflow,
    ) -> None:
        self._config = config
        self._store = store
        self._timeline = store.timeline
        self._scheduler = scheduler
        self._cost_model = cost_model
        self._prefill = prefill
        self._decode = decode
        self._overflow = overflow
        self._staging = Staging(config, window, store, scheduler, cost_model)
        self._running = Running(config.max_batch)
        self._publisher = Publisher(config, store)
        self._ending = Ending(
            config, store, scheduler, self._staging, self._running, decode
        )

    @property
    def totals(self) -> Totals:
        """Sums over all turns that have ended."""
        return self._ending.totals

    def step(self) -> None:
        """Advances every turn that can advance; the whole design in five calls."""
        self._look_ahead()
        self._start_next()
        self._prefill_groups()
        self._decode_batch()
        self._collect(leave=2 if self._store.saver.delays_tokens else 1)

    def stop(self) -> None:
        """Ends every turn as cancelled."""
        for turn in self._scheduler.running + self._scheduler.waiting:
            turn.cancel()
        self._collect(leave=0)
        self._ending.end_cancelled()

    # ---- the five verbs of a step ----

    def _look_ahead(self) -> None:
        """Looks after copies under way, and begins those of the next turns.

        Saves begin when the tokens of the step before have come: pages handed over
        before would delay them. The device has a step in flight meanwhile.
        """
        self._ending.end_cancelled()
        self._store.poll()
        if self._running.blocked is not None:
            return  # the first in the queue needs every slot that gets free
        with self._ending.bad_turns():
            self._staging.look_ahead(self._next(), is_idle=not self._running.decoding)
        if self._config.is_preloading:
            self._store.prefetch()

    def _start_next(self) -> None:
        """Gives a seat to the next turn whose pages are there, or about to come."""
        self._restart_overflowed()
        if (turn := self._next()) is None:
            return
        patience_s = 0.0
        if turn.times.started_s is None:
            # On an idle device, or its prefill would be timed with a step of others.
            self._collect(leave=0)
            turn.times.started_s = time.monotonic()
            patience_s = _PATIENCE_S
        job, is_idle = None, not self._running.decoding
        with self._ending.bad_turns():
            job = self._staging.next(patience_s, is_idle=is_idle)
            if job is None and is_idle:  # the device waits for the pages itself
                job = self._staging.wait(turn, None, only_put=True)
        if job is not None and self._has_room(job):
            self._start(job)
        elif job is not None or self._staging.is_blocked(turn) and not turn.is_finished:
            turn.times.started_s = None
            self._running.blocked = turn

    def _prefill_groups(self) -> None:
        """Dispatches the layer groups of the prefill whose pages have arrived."""
        job = self._running.prefilling
        if job is None:
            return
        with self._ending.guard([job]):
            assert job.prefill is not None
            if self._store.leases.forget_bad(job.lease):
                job.abandon_save()
                self._staging.renew(job)
                self._begin_prefill(job)
            # Until its pages come the others decode, and without others it waits.
            until_s = job.started_s + _PATIENCE_S if self._running.decoding else None
            is_gated = bool(self._running.decoding) or self._store.links.are_emulated
            if job.prefill.advance(is_gated=is_gated, until_s=until_s):
                self._sample_first(job)

    def _decode_batch(self) -> None:
        """Dispatches one step for every turn that still needs tokens."""
        self._make_room()
        jobs = self._running.ready
        if not jobs:
            return
        started = time.monotonic()
        with self._ending.guard(jobs):
            sampled = self._decode.run(
                [
                    Row(
                        seat=job.seat,
                        page_table=job.page_table,
                        length=job.context_tokens,
                        position=job.num_tokens,
                        sampling=job.turn.request.sampling,
                    )
                    for job in jobs
                    if job.seat is not None
                ]
            )
            for job in jobs:
                job.num_dispatched += 1
            self._running.in_flight.append(
                InFlight(jobs=jobs, sampled=sampled, name="decode", start_s=started)
            )

    def _collect(self, *, leave: int) -> None:
        """Reads tokens of dispatched programs, except of the last `leave` of them.

        They stay in flight, so the device computes while the host looks at tokens.
        """
        if not self._running.needs_tokens:
            leave = 0
        while len(self._running.in_flight) > leave:
            work = self._running.in_flight.popleft()
            token_ids, margins, now = [], [], 0.0
            with self._ending.guard(work.jobs, is_device_lost=True):
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
                    with self._ending.guard([job]):
                        self._record(job, token, margin, now)

    # ---- parts of them ----

    def _next(self) -> Turn | None:
        """The turn that may start in this step, if its pages and slots allow."""
        turn = self._scheduler.next()
        return turn if self._running.may_start(turn) else None

    def _make_room(self) -> None:
        """Truncates what has filled its window, or pauses it until slots are free."""
        for job in filter(self._overflow.is_full, self._running.advancing):
            with self._ending.guard([job]):
                self._overflow.make_room(job, lambda: self._collect(leave=0))
                if job.is_paused and self._staging.give_way():
                    self._overflow.make_room(job, lambda: self._collect(leave=0))
        paused = self._running.paused
        if paused and len(paused) == len(self._running.jobs):
            # They wait for each other: one has to end.
            with self._ending.guard(paused[:1]):
                self._collect(leave=0)
                self._store.counters["truncations_without_room"] += 1
                self._ending.finish(paused[0], "window")

    def _has_room(self, job: Job) -> bool:
        if self._overflow.has_room(job):
            return True
        return self._staging.give_way(job.turn) and self._overflow.has_room(job)

    def _start(self, job: Job) -> None:
        turn = job.turn
        self._collect(leave=0)
        job.started_s = time.monotonic()
        if turn.times.started_s is None:
            turn.times.started_s = job.started_s
        ticket = self._scheduler.ticket(turn)
        assert ticket is not None
        self._scheduler.start(turn)
        self._store.placement.started(turn.session, ticket, job.started_s)
        del self._staging.jobs[turn]
        self._running.start(job)
        with self._ending.guard([job]):
            self._begin_prefill(job)

    def _restart_overflowed(self) -> None:
        """Computes anew what a truncation left of a turn, if one waits for that."""
        running = self._running
        if running.overflowed is None or running.prefilling is not None:
            return
        self._collect(leave=0)
        if (job := running.overflowed) is None:
            return
        with self._ending.guard([job]):
            self._staging.restart(job, self._overflow.next(job))
            running.prefill_again(job)
            job.started_s = time.monotonic()
            self._begin_prefill(job)

    def _begin_prefill(self, job: Job) -> None:
        turn, lease = job.turn, job.lease
        if not turn.reply:
            turn.tokens_from = job.plan.tokens_from(lease)
            turn.decision = job.decision.choice
            turn.decision_reason = job.decision.reason
        self._publisher.begin(job)
        job.prefill = self._prefill.begin_segments(
            self._overflow.segments(job),
            lease.inbound,
            read_ahead=job.read_ahead,
            is_preloading=self._config.is_preloading,
            on_group=lambda group: self._publisher.save_group(job, group),
        )
        if turn.reply:
            turn.num_recomputed_midway += job.prefill.num_tokens - 1
        else:
            turn.num_chunk_tokens = 0
        turn.num_chunk_tokens += job.prefill.num_padded

    def _sample_first(self, job: Job) -> None:
        """The prefill is dispatched: its pages can be found, its first token comes."""
        assert job.prefill is not None and job.seat is not None
        self._store.leases.forget_dropped(job.lease)
        self._decode.last_tokens, sampled = self._prefill.first_token(
            job.prefill,
            self._decode.last_tokens,
            job.seat,
            sampling_batch([job.turn.request.sampling], 1),
            job.num_tokens,
        )
        job.num_dispatched += 1
        self._publisher.publish(job)
        self._running.decode(job)
        start_s = time.monotonic()
        self._running.in_flight.append(
            InFlight(jobs=[job], sampled=sampled, name="prefill", start_s=start_s)
        )

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
            self._ending.finish(job, "stop")
        elif len(turn.reply) == job.max_tokens:
            is_full = job.max_tokens < turn.request.max_tokens
            self._ending.finish(job, "window" if is_full else "length")
        else:
            self._publisher.publish_filled(job)
