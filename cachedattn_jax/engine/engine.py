"""The serving loop: turns start, prefill, decode and end; their pages stay in the
store.

Knows the order of things. Does not know attention, budgets or queue discipline. The
thread that calls `step` is the one that dispatches all JAX work.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, no_type_check

import jax
import numpy as np

from cachedattn_jax.engine.decode import Decode, Row
from cachedattn_jax.engine.plan import TurnPlan, check_window, plan_turn
from cachedattn_jax.engine.prefill import Prefill
from cachedattn_jax.engine.request import Request
from cachedattn_jax.engine.sampling import Sampled, sampling_batch
from cachedattn_jax.engine.scheduler import Scheduler
from cachedattn_jax.engine.session import Session
from cachedattn_jax.engine.turn import FinishReason, Times, Turn
from cachedattn_jax.engine.warm_up import warm_up
from cachedattn_jax.model.config import LlamaConfig
from cachedattn_jax.model.llama import LlamaParams, weights_digest
from cachedattn_jax.store.budget import StoreConfig
from cachedattn_jax.store.catalog import SessionRecord, check_id, session_key
from cachedattn_jax.store.layout import Layout
from cachedattn_jax.store.lease import Lease
from cachedattn_jax.store.placement import QueueView
from cachedattn_jax.store.tiered_store import TieredStore
from cachedattn_jax.timeline import Timeline
from pallas_kernels.backends import Kernels
from pallas_kernels.rope import rope_tables

# How long decoding pauses for pages that a starting turn needs from disk. They often
# come within this (22 pages of 0.5 MiB in 7 ms); a decode step would keep the turn
# longer.
_PATIENCE_S = 0.02


@no_type_check  # gin passes what users write; checked here in words of ours
@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the engine cuts and batches its work.

    Attributes:
        page_tokens: tokens of a page, the unit that is stored and moved.
        layers_per_group: consecutive layers whose pages move together.
        max_batch: turns that run at the same time.
        chunk_tokens: sizes of the compiled prefill programs, in tokens.
        reuse: "cached" keeps the KV of finished turns; "recompute" is the baseline, the
            same engine without the store.
        prefill_kernel, decode_kernel: the attention implementation, one of
            `pallas_kernels.backends.BACKENDS`, or "auto" for the one of the platform.
        interpret_kernels: run Pallas kernels in their interpreter, on any platform;
            slow, for tests.
    """

    page_tokens: int = 16
    layers_per_group: int = 1
    max_batch: int = 8
    chunk_tokens: tuple[int, ...] = (16, 64, 256)
    reuse: Literal["cached", "recompute"] = "cached"
    prefill_kernel: str = "auto"
    decode_kernel: str = "auto"
    interpret_kernels: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "chunk_tokens", tuple(self.chunk_tokens))
        for name in ("page_tokens", "layers_per_group", "max_batch"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number from 1 on")
        sizes = self.chunk_tokens
        if not sizes or not all(isinstance(s, int) and s > 0 for s in sizes):
            raise ValueError(f"chunk_tokens={sizes} must be whole numbers from 1 on")
        if self.reuse not in ("cached", "recompute"):
            raise ValueError(f"reuse={self.reuse!r} is not 'cached' or 'recompute'")
        _ = self.kernels  # raises for a name that is no backend

    @property
    def kernels(self) -> Kernels:
        return Kernels(
            prefill=self.prefill_kernel,
            decode=self.decode_kernel,
            interpret=self.interpret_kernels,
        )


@dataclass(eq=False, kw_only=True)
class _Running:
    """A turn that holds pages and a seat.

    Attributes:
        page_table: int32 [pages_per_sequence], the lease's slots and then zeros.
        num_dispatched: reply tokens whose computation was dispatched.
    """

    turn: Turn
    plan: TurnPlan
    lease: Lease
    seat: int
    page_table: np.ndarray
    num_dispatched: int = 0

    @property
    def needs_tokens(self) -> bool:
        return self.num_dispatched < self.plan.max_tokens


@dataclass(frozen=True, kw_only=True)
class _InFlight:
    """A dispatched program and whose tokens it brings, row by row."""

    rows: list[_Running]
    sampled: Sampled
    name: str
    start_s: float


class Engine:
    """Serves turns of conversations with one model, keeping their KV cache in tiers.

    Args:
        weights: identity of `params`; computed from all their bits if not given.

    Raises:
        ValueError: the budgets cannot hold one full window, or the disk root is
            unusable.
    """

    def __init__(
        self,
        model: LlamaConfig,
        params: LlamaParams,
        config: EngineConfig | None = None,
        store: StoreConfig | None = None,
        *,
        weights: str | None = None,
        device: jax.Device | None = None,
    ) -> None:
        self.model = model
        self.config = config or EngineConfig()
        device = device if device is not None else jax.devices()[0]
        layout = self._layout(weights or weights_digest(params))
        store_config = store or StoreConfig()
        if self.config.reuse == "recompute":
            store_config = store_config.device_only
        self._check_budget(store_config, layout)
        self.store = TieredStore(layout, store_config, device)
        self.timeline = Timeline()
        self.scheduler: Scheduler[Turn] = Scheduler(self.config.max_batch)
        self._pages_per_sequence = layout.num_pages(model.window)
        rope = rope_tables(
            model.inverse_frequencies(),
            page_tokens=layout.page_tokens,
            num_pages=self._pages_per_sequence,
        )
        params, rope = jax.device_put((params, rope), self.store.pool.device_sharding)
        self._prefill = Prefill(
            model,
            params,
            rope,
            self.store.pool,
            chunk_tokens=self.config.chunk_tokens,
            puts_first=self.store.pool.platform != "tpu",
            kernels=self.config.kernels,
        )
        self._decode = Decode(
            model,
            params,
            rope,
            self.store.pool,
            num_seats=self.config.max_batch,
            pages_per_sequence=self._pages_per_sequence,
            kernels=self.config.kernels,
        )
        self._free_seats = list(range(self.config.max_batch))
        self._loading: deque[_Running] = deque()
        self._decoding: list[_Running] = []
        self._in_flight: deque[_InFlight] = deque()
        # The next turn, while it waits for slots that running turns hold: trying again
        # before one of them ends would drain the device at every step for nothing.
        self._blocked: Turn | None = None

    # ---- what a user calls ----

    def session(self, session_id: str, *, tenant: str = "default") -> Session:
        """A conversation, new or known."""
        check_id("session_id", session_id)
        check_id("tenant", tenant)
        return Session(self, session_id, tenant)

    def submit(self, request: Request) -> Turn:
        """Queues a turn; `step` makes it go on.

        Raises:
            ValueError: the request cannot be served; nothing has changed then.
        """
        check_id("session_id", request.session_id)
        check_id("tenant", request.tenant)
        self._check_prompt(request)
        turn = Turn(
            request=request,
            session=session_key(request.tenant, request.session_id),
            times=Times(submitted_s=time.monotonic()),
        )
        self.scheduler.submit(turn)
        return turn

    def rewind(self, tenant: str, session_id: str, num_tokens: int) -> None:
        """Makes a session's first `num_tokens` tokens all that was said.

        Raises:
            ValueError: it has fewer tokens, or a turn of it waits or runs.
        """
        self._check_quiet(tenant, session_id)
        self.store.rewind(tenant, session_id, num_tokens)

    def forget(self, tenant: str, session_id: str) -> None:
        """Deletes a session and its pages; ValueError while it has a turn under way."""
        self._check_quiet(tenant, session_id)
        self.store.forget_session(tenant, session_id)

    def run(self, requests: Iterable[Request]) -> list[Turn]:
        """Serves all requests, batched, and returns their turns in the same order."""
        turns = [self.submit(request) for request in requests]
        self.run_until_idle()
        return turns

    def run_until_idle(self) -> None:
        """Steps until no turn waits or runs."""
        while not self.scheduler.is_idle:
            self.step()

    def step(self) -> None:
        """Advances every turn that can advance; the whole design in five calls."""
        self._look_ahead()
        self._start_turn()
        self._prefill_next()
        self._decode_batch()
        self._collect(leave=1)

    def warm_up(self, progress: Callable[[str, int, int], None] | None = None) -> None:
        """Compiles every program before the first turn needs it.

        Args:
            progress: called with what is compiled, how many are done, and of how many.
        """
        warm_up(self._prefill, self._decode, self.store.pool, progress)

    def close(self) -> None:
        """Cancels turns, writes what only memory holds to disk, stops the threads."""
        for turn in self.scheduler.running + self.scheduler.waiting:
            turn.cancel()
        self._collect(leave=0)
        self._end_cancelled()
        self.store.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check_prompt(self, request: Request) -> None:
        request.check_vocabulary(self.model.vocab_size)
        record = self.store.catalog.find(request.tenant, request.session_id)
        check_window(self.model.window, request, record)

    def _check_quiet(self, tenant: str, session_id: str) -> None:
        session = session_key(tenant, session_id)
        if session in {
            t.session for t in self.scheduler.running + self.scheduler.waiting
        }:
            raise ValueError(f"a turn of session {session_id!r} waits or runs")

    # ---- the five verbs of a step ----

    def _look_ahead(self) -> None:
        self._end_cancelled()
        self.store.poll(QueueView(waiting=self.scheduler.upcoming()))

    def _start_turn(self) -> None:
        """Leases pages and a seat for the next turn; its pages begin to load."""
        if any(run.lease.is_ready for run in self._loading):
            return  # one prefill a step; the next turn starts with the next
        turn = self.scheduler.next()
        if turn is None or turn is self._blocked:
            return
        # The turn starts on an idle device, or its prefill would be timed with a step
        # of others in it.
        self._collect(leave=0)
        try:
            plan = self._plan(turn)
        except ValueError as error:
            self._end(turn, "error", error)
            return
        started_s = time.monotonic()
        lease = self._acquire(turn, plan)
        if lease is None:
            self._blocked = turn
        else:
            turn.times.started_s = started_s
            self.scheduler.start(turn)
            self._loading.append(self._running(turn, plan, lease))
            lease.wait(_PATIENCE_S)

    def _prefill_next(self) -> None:
        """Dispatches the prefill of the first turn whose pages have arrived."""
        if not self._loading:
            return
        ready = next((run for run in self._loading if run.lease.is_ready), None)
        if ready is None:
            if self._decoding:
                return  # decode meanwhile
            ready = self._loading[0]
        if not self._settle(ready):
            return
        self._loading.remove(ready)
        self._collect(leave=0)
        with self._guard([ready]):
            self._dispatch_prefill(ready)

    def _decode_batch(self) -> None:
        """Dispatches one step for every turn that still needs tokens."""
        rows = [run for run in self._decoding if run.needs_tokens]
        if not rows:
            return
        started = time.monotonic()
        with self._guard(rows):
            sampled = self._decode.run(
                [
                    Row(
                        seat=run.seat,
                        page_table=run.page_table,
                        length=len(run.turn.prompt) + run.num_dispatched,
                        sampling=run.turn.request.sampling,
                    )
                    for run in rows
                ]
            )
            for run in rows:
                run.num_dispatched += 1
            self._in_flight.append(
                _InFlight(rows=rows, sampled=sampled, name="decode", start_s=started)
            )

    def _collect(self, *, leave: int) -> None:
        """Reads tokens of dispatched programs, except of the last `leave` of them.

        One step stays in flight, so the device computes while the host looks at tokens.
        """
        if not any(run.needs_tokens for run in self._decoding):
            leave = 0
        while len(self._in_flight) > leave:
            work = self._in_flight.popleft()
            token_ids = np.asarray(work.sampled.token_ids).tolist()
            margins = np.asarray(work.sampled.margins).tolist()
            now = time.monotonic()
            self.timeline.add(
                work.name, "compute", work.start_s, now, batch=len(work.rows)
            )
            for run, token, margin in zip(work.rows, token_ids, margins, strict=False):
                if not run.turn.is_finished:
                    self._record(run, token, margin, now)

    # ---- parts of them ----

    def _plan(self, turn: Turn) -> TurnPlan:
        request = turn.request
        record = self.store.catalog.find(request.tenant, request.session_id)
        turn.turn_index = 0 if record is None else record.num_turns
        return plan_turn(self.store.layout, self.model.window, request, record)

    def _acquire(self, turn: Turn, plan: TurnPlan) -> Lease | None:
        keys, tail = plan.reusable_keys, plan.tail
        if self.config.reuse == "recompute":
            keys, tail = [], None
        num_pages = self.store.layout.num_pages(len(plan.prompt) + plan.max_tokens)
        return self.store.acquire(turn.session, keys, tail, num_pages)

    def _running(self, turn: Turn, plan: TurnPlan, lease: Lease) -> _Running:
        turn.prompt = plan.prompt
        page_table = np.zeros(self._pages_per_sequence, np.int32)
        page_table[: len(lease.slots)] = lease.slots
        seat = self._free_seats.pop()
        return _Running(
            turn=turn, plan=plan, lease=lease, seat=seat, page_table=page_table
        )

    def _settle(self, run: _Running) -> bool:
        """Whether all loaded pages are good; otherwise leases anew without the bad."""
        while not self.store.settle(run.lease):
            self.store.release(run.lease)
            lease = self._acquire(run.turn, run.plan)
            assert lease is not None  # it takes the slots just given back
            run.lease = lease
            run.page_table[: len(lease.slots)] = lease.slots
            if not lease.is_ready:
                return False
        return True

    def _dispatch_prefill(self, run: _Running) -> None:
        turn, lease = run.turn, run.lease
        turn.times.loaded_s = time.monotonic()
        turn.tokens_from = run.plan.tokens_from(lease)
        self._decode.last_tokens, sampled, turn.num_chunk_tokens = self._prefill.run(
            turn.prompt[lease.cached_tokens :],
            lease.cached_tokens,
            lease.loads,
            run.page_table,
            self._decode.last_tokens,
            run.seat,
            sampling_batch([turn.request.sampling], 1),
        )
        lease.loads = []
        run.num_dispatched = 1
        if self.config.reuse == "cached":
            self.store.publish(lease, run.plan.keys, turn.prompt)
        self._decoding.append(run)
        self._in_flight.append(
            _InFlight(
                rows=[run],
                sampled=sampled,
                name=f"prefill {turn.request.session_id}",
                start_s=turn.times.loaded_s,
            )
        )

    def _record(self, run: _Running, token: int, margin: float, now: float) -> None:
        """Takes note of a reply token; ends the turn if it was the last."""
        turn = run.turn
        turn.reply.append(token)
        turn.margins.append(margin)
        if turn.times.first_token_s is None:
            turn.times.first_token_s = now
        if token in turn.request.stop_token_ids:
            self._finish(run, "stop")
        elif len(turn.reply) == run.plan.max_tokens:
            is_full = run.plan.max_tokens < turn.request.max_tokens
            self._finish(run, "window" if is_full else "length")

    def _finish(self, run: _Running, reason: FinishReason) -> None:
        """Ends a turn that has a reply: its tokens and pages become the session's."""
        turn = run.turn
        token_ids = np.concatenate([turn.prompt, np.asarray(turn.reply, np.int32)])
        keys, tail = run.plan.final_pages(self.store.layout, token_ids)
        record = SessionRecord(
            session_id=turn.request.session_id,
            tenant=turn.request.tenant,
            token_ids=token_ids,
            num_turns=turn.turn_index + 1,
            used_at=time.time(),
            page_keys=tuple(keys),
        )
        if self.config.reuse == "cached":
            with self.timeline.span("save", "device to host"):
                self.store.commit(run.lease, keys, tail, record)
        else:
            self.store.catalog.commit(record)
        self._let_go(run)
        self._end(turn, reason)

    def _let_go(self, run: _Running) -> None:
        """Gives back the pages and the seat of a turn, whatever became of it."""
        self.store.release(run.lease)
        self._blocked = None
        self._free_seats.append(run.seat)
        for place in (self._loading, self._decoding):
            if run in place:
                place.remove(run)

    def _end(
        self, turn: Turn, reason: FinishReason, error: Exception | None = None
    ) -> None:
        turn.times.finished_s = time.monotonic()
        turn.error = error
        turn.finish_reason = reason
        self.scheduler.finish(turn)

    def _end_cancelled(self) -> None:
        for turn in [t for t in self.scheduler.waiting if t.is_cancel_requested]:
            self._end(turn, "cancelled")
        for run in [*self._loading, *self._decoding]:
            if run.turn.is_cancel_requested and run.turn.reply:
                self._finish(run, "cancelled")
            elif run.turn.is_cancel_requested and run in self._loading:
                self._let_go(run)
                self._end(run.turn, "cancelled")

    @contextmanager
    def _guard(self, runs: list[_Running]) -> Iterator[None]:
        """Ends the turns of a program that could not be dispatched, and only those.

        A donating call that raises may take a pool with it; then every running turn
        ends and the pages that were on the device count as lost.
        """
        try:
            yield
        except Exception as error:
            is_lost = self.store.pool.is_lost
            if is_lost:
                # Those of the failed program may stand in neither list at the moment.
                rest = [*self._loading, *self._decoding]
                runs = runs + [run for run in rest if run not in runs]
                self._in_flight.clear()
            for run in runs:
                self._let_go(run)
                self._end(run.turn, "error", error)
            if is_lost:
                self.store.forget_device()
                self._decode.reset()

    def _layout(self, weights: str) -> Layout:
        model = self.model
        return Layout(
            num_layers=model.num_layers,
            layers_per_group=self.config.layers_per_group,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            page_tokens=self.config.page_tokens,
            dtype=model.dtype,
            rope=f"theta={model.rope_theta} scaling={model.rope_scaling}",
            norm_eps=model.norm_eps,
            weights=weights,
        )

    def _check_budget(self, store: StoreConfig, layout: Layout) -> None:
        least = layout.num_pages(self.model.window)
        if store.num_slots(layout) < least:
            raise ValueError(
                f"device_bytes={store.num_device_bytes} holds {store.num_slots(layout)}"
                f" pages; one window of {self.model.window} tokens needs {least} pages,"
                f" {least * layout.page_bytes} bytes"
            )
