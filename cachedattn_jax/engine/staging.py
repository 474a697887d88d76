"""Turns whose pages are on their way, and which of them starts next.

Knows leases, read buffers and the order of the queue. Does not know models or how a
prefill runs.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from cachedattn_jax.engine.cost_model import CostModel
from cachedattn_jax.engine.engine_config import EngineConfig
from cachedattn_jax.engine.job import Job
from cachedattn_jax.engine.plan import plan_next
from cachedattn_jax.engine.prospect import Prospect, Prospects, copied
from cachedattn_jax.engine.scheduler import Scheduler
from cachedattn_jax.engine.turn import Turn
from cachedattn_jax.store.tiered_store import TieredStore
from cachedattn_jax.store.truncation import Truncation

# Groups that are copied ahead where no constants were measured.
_USUAL_READ_AHEAD = 2


class NoSlots(Exception):
    """Running turns hold all slots, so that shared ones cannot be replaced."""


class BadTurn(Exception):
    """A waiting turn that cannot be served after all."""

    def __init__(self, turn: Turn, error: Exception) -> None:
        super().__init__(str(error))
        self.turn, self.error = turn, error


@contextmanager
def _blamed_on(turn: Turn) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise BadTurn(turn, error) from error


class Staging:
    """Leases turns ahead of their prefill, so that their pages are there in time.

    Attributes:
        jobs: leased turns that have no seat yet, in the order they were leased.
    """

    def __init__(
        self,
        config: EngineConfig,
        window: int,
        store: TieredStore,
        scheduler: Scheduler[Turn],
        cost_model: CostModel,
    ) -> None:
        self.jobs: dict[Turn, Job] = {}
        self._config = config
        self._window = window
        self._store = store
        self._scheduler = scheduler
        self._cost_model = cost_model
        self._prospects = Prospects(config, window, store, cost_model)
        self._pages_per_sequence = store.layout.num_pages(window)
        self._looked_at: weakref.WeakSet[Turn] = weakref.WeakSet()

    def look_ahead(self, first: Turn | None, *, is_idle: bool) -> None:
        """Leases the next turns that have something to load; their copies begin.

        Args:
            first: the one that starts now, whatever it has to load.
            is_idle: whether the device has nothing else to do then.
        """
        if not self._config.is_preloading:
            return
        is_alone = is_idle and self._scheduler.num_waiting == 1
        for turn in self._scheduler.startable(self._config.max_staged):
            is_known = turn in self._looked_at or turn in self.jobs
            if is_known or len(self.jobs) >= self._config.max_staged:
                continue
            self._looked_at.add(turn)
            with _blamed_on(turn):
                prospect = self._prospects.of(turn)
                # To lay it out once more would take 8K tokens a millisecond.
                is_wanted = turn is first or prospect.has_loads
                job = self._lease(turn, prospect) if is_wanted else None
                if is_wanted and job is None:
                    return
            if job is not None and is_alone:
                self._load_in_order(job)
        for turn, job in self.jobs.items():
            with _blamed_on(turn):
                job.lease.inbound.put_through(job.read_ahead)

    def next(self, patience_s: float, *, is_idle: bool) -> Job | None:
        """The job whose prefill may begin now.

        The first that is ready, unless one before it was passed too often; if none is,
        the first in the queue once its first pages have come. None while all wait, or
        while running turns hold the slots that the first one needs.

        Args:
            patience_s: how long to wait for the first in the queue before others pass.
            is_idle: whether the device has nothing else to do. A turn that nobody waits
                behind begins then when its first pages are on their way.
        """
        passed: list[Job] = []
        is_alone = is_idle and self._scheduler.num_waiting == 1
        for turn in self._scheduler.startable(1 + self._config.max_staged):
            with _blamed_on(turn):
                job = self.jobs.get(turn) or self._lease(turn, self._prospects.of(turn))
                if job is None and not passed:
                    job = self._lease_first(turn)
                if job is None:
                    break
                if not passed and not self._is_ready(job):
                    self.wait(turn, patience_s, only_put=is_alone)
                if self._is_ready(job) or is_alone and job.lease.inbound.is_put(0):
                    for other in passed:
                        other.num_passed += 1
                        other.turn.times.started_s = None
                    return job
            passed.append(job)
            if job.num_passed >= self._config.max_passes:
                break
        if passed and passed[0].lease.inbound.has_arrived(0):
            return passed[0]
        return None

    def wait(
        self, turn: Turn, timeout_s: float | None, *, only_put: bool = False
    ) -> Job | None:
        """The job of a turn, if its first pages come within this time.

        Args:
            only_put: whether it is enough that they are on their way to the device.
        """
        job = self.jobs.get(turn)
        if job is None:
            return None
        with _blamed_on(turn):
            while not job.lease.inbound.wait(0, timeout_s, only_put=only_put):
                if not self._forget_bad(job):
                    return None
        return job

    def is_blocked(self, turn: Turn) -> bool:
        """Whether a turn that is next holds no lease: there were no slots for it."""
        return turn not in self.jobs

    def renew(self, job: Job) -> None:
        """Leases anew after some of a job's pages turned out bad."""
        self._store.leases.release(job.lease)
        prospect = self._prospects.of(job.turn)
        lease = self._acquire(job.turn, prospect)
        assert lease is not None  # it takes the slots just given back
        self._fill(job, prospect, lease)

    def restart(self, job: Job, truncation: Truncation) -> None:
        """Leases anew what a truncation left of a running turn, to be computed anew."""
        self._store.leases.abandon(job.lease)
        plan = plan_next(
            self._config.truncation,
            self._window,
            job.plan,
            job.token_ids,
            (*job.truncations, truncation),
            len(job.token_ids) - 1,
        )
        job.turn.num_truncations += 1
        job.num_published = 0
        prospect = self._prospects.of_plan(job.turn, plan)
        lease = self._acquire(job.turn, prospect)
        if lease is None and self.give_way():
            lease = self._acquire(job.turn, prospect)
        if lease is None:  # only where shared pages were most of what it gave back
            raise NoSlots("running turns hold all slots that a truncation needs")
        self._fill(job, prospect, lease)
        if self._config.truncation.loses_pages:
            self._store.sessions.lose(job.turn.session)

    def give_way(self, to: Turn | None = None) -> bool:
        """Gives back the slots of all turns but one; whether any had some."""
        others = [turn for turn in self.jobs if turn is not to]
        for turn in others:
            self.drop(turn)
        return bool(others)

    def drop(self, turn: Turn) -> None:
        """Gives back what a turn that will not start holds; it may be leased again."""
        job = self.jobs.pop(turn, None)
        if job is not None:
            self._store.leases.release(job.lease)
        self._looked_at.discard(turn)

    def _forget_bad(self, job: Job) -> bool:
        """Whether pages turned out bad, and the job goes on without them."""
        if not self._store.leases.forget_bad(job.lease):
            return False
        self.renew(job)
        return True

    def _acquire(self, turn: Turn, prospect: Prospect):
        plan = prospect.plan
        num_pages = min(prospect.num_pages, self._pages_per_sequence)
        if plan.truncates_meanwhile:
            num_pages = self._pages_per_sequence
        lease = self._store.leases.acquire(
            turn.session, prospect.found, plan.tail, num_pages
        )
        is_new = len(plan.truncations) > plan.num_known
        if lease is not None and is_new and self._config.truncation.loses_pages:
            self._store.sessions.lose(turn.session)
        return lease

    def _lease(self, turn: Turn, prospect: Prospect) -> Job | None:
        assert turn not in self.jobs
        lease = self._acquire(turn, prospect)
        if lease is None:
            return None
        job = Job(
            turn=turn,
            plan=prospect.plan,
            decision=prospect.decision,
            lease=lease,
            page_table=np.zeros(self._pages_per_sequence, np.int32),
            read_ahead=0,
            chain=prospect.plan.stored,
        )
        self._fill(job, prospect, lease)
        self.jobs[turn] = job
        return job

    def _lease_first(self, turn: Turn) -> Job | None:
        """Leases the first in the queue with the slots of those staged behind it."""
        has_given_way = self.give_way()
        return self._lease(turn, self._prospects.of(turn)) if has_given_way else None

    def _fill(self, job: Job, prospect: Prospect, lease) -> None:
        job.plan, job.decision, job.lease = prospect.plan, prospect.decision, lease
        plan = job.plan
        job.chain, job.truncations = plan.stored, plan.truncations
        job.context, job.max_tokens = plan.whole.context, plan.max_tokens
        job.page_table[: len(lease.slots)] = lease.slots
        if not job.turn.reply:
            job.turn.prompt = plan.prompt
            job.turn.num_truncations = len(plan.truncations) - plan.num_known
        job.turn.is_exact = all(item.method != "lost" for item in plan.truncations)
        job.read_ahead = self._read_ahead(job)

    def _read_ahead(self, job: Job) -> int:
        if self._config.read_buffer != "auto":
            return int(self._config.read_buffer)
        lease = job.lease
        held = list(filter(None, lease.entries))
        from_disk = [e.slot is None and e.slab is None for e in held].count(True)
        groups = self._cost_model.read_ahead(
            sum(copied(held)) - from_disk,
            from_disk,
            job.plan.context_tokens - lease.cached_tokens,
            lease.cached_tokens,
        )
        return _USUAL_READ_AHEAD if groups is None else groups

    def _load_in_order(self, job: Job) -> None:
        """For a turn that starts at once: no time before it could fill a buffer.

        Where copies share the link, a buffer does harm then: with 4 of 5 groups of 13B
        under way, 2,048 tokens on an H100, the first came after 21 ms instead of 7.
        """
        if self._store.pool.copies_share_link:
            job.read_ahead = min(1, job.read_ahead)

    def _is_ready(self, job: Job) -> bool:
        """Whether a prefill that starts now is expected to find its pages in time."""
        if not self._config.is_preloading:
            return True  # it loads when it runs
        self._forget_bad(job)
        inbound = job.lease.inbound
        inbound.put_through(max(1, job.read_ahead))
        return inbound.has_arrived(max(1, min(job.read_ahead, inbound.num_groups)) - 1)
