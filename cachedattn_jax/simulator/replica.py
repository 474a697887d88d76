"""One engine in virtual time: turns wait, load, prefill, decode and end.

Knows the order of things, as `engine.loop` and `engine.staging` do. Does not know pages
or policies. The device computes one prefill at a time, which decodes wait for, and
decodes all running turns together; a turn waits for the step that runs when it comes.
"""

import heapq
import itertools
import math
from collections.abc import Callable

from cachedattn_jax.engine.cost_model import CostModel
from cachedattn_jax.engine.pipeline import equal_groups_finish_s, read_buffer_groups
from cachedattn_jax.engine.scheduler import Scheduler
from cachedattn_jax.simulator.pages import Pages
from cachedattn_jax.simulator.results import Busy, Results
from cachedattn_jax.simulator.simulated_staging import (
    History,
    SimulatedStaging,
    num_pages,
)
from cachedattn_jax.simulator.simulated_store import SimulatedStore
from cachedattn_jax.simulator.system import System
from cachedattn_jax.simulator.truncation import Truncation
from cachedattn_jax.simulator.turn import Turn
from cachedattn_jax.store.budget import SAVED_TOGETHER
from cachedattn_jax.store.placement.placement import Placement


class Replica:
    """A system at work.

    Args:
        results: where rows of turns are filled in.
        started: a counter over all replicas of the turns that started.
        next_arrival: called with a turn that ended and the time; returns when the
            session's next turn comes, or None if there is none.
        histories: of sessions that other replicas serve too, by session; None where a
            session stays with its replica.
    """

    def __init__(
        self,
        system: System,
        results: Results,
        started: "itertools.count[int]",
        next_arrival: Callable[[Turn, float], float | None],
        *,
        histories: dict[int, History] | None = None,
        keeps_moves: bool = False,
    ) -> None:
        self.system = system
        self.busy = Busy()
        self.scheduler: Scheduler[Turn] = Scheduler(system.max_batch)
        self.placement = Placement(
            system.placement,
            host_bytes=system.host_bytes,
            disk_bytes=system.disk_bytes,
        )
        self.store = SimulatedStore(system, self.placement, keeps_moves=keeps_moves)
        self.clock = 0.0
        self._results = results.columns
        self._started = started
        self._next_arrival = next_arrival
        self._histories = histories
        self._cost_model = CostModel(
            system.constants,
            page_tokens=system.tokens_per_page,
            page_bytes=system.page_bytes,
            num_groups=system.groups,
            chunk_sizes=tuple(system.constants.prefill),
        )
        self._step_s = system.constants.decode_step_s
        self._num_steps = 0
        self._decoding: list[tuple[int, int, Turn]] = []  # by the step they end with
        self._tie = itertools.count()
        self._truncation = Truncation(system, self.store, self._cost_model, self.busy)
        self._staging = SimulatedStaging(
            system, self.store, self._truncation, self._cost_model, histories
        )

    # ---- what the world does ----

    def submit(self, turn: Turn, now: float, tenant: str = "") -> None:
        """A user sends a turn."""
        turn.arrived_s = turn.loads_from_s = now
        turn.ticket = self.scheduler.submit(turn)
        self.placement.queued(turn.session, turn.ticket, now, tenant)

    def wake(self, now: float) -> float | None:
        """Does all that can be done by now; returns when there is more to do."""
        self._decode_until(now)
        self._end_finished()
        self.store.background(self.clock)
        turn = self._next_turn()
        if turn is not None:
            self._prefill(turn)
            self._end_finished()
        return self._next_wake(turn is not None)

    # ---- the verbs of a step ----

    def _decode_until(self, now: float) -> None:
        """Decodes whole steps, the last of which may end after `now`."""
        if not self._decoding:
            self.clock = max(self.clock, now)
            return
        behind = now - self.clock
        if behind <= 0:
            return
        steps = min(
            math.ceil(behind / self._step_s - 1e-6),
            self._decoding[0][0] - self._num_steps,
        )
        self._num_steps += steps
        self.busy.decode_s += steps * self._step_s
        # Not a rounding error before `now`, or what is due then would never be.
        self.clock = max(self.clock + steps * self._step_s, now)

    def _end_finished(self) -> None:
        while self._decoding and self._decoding[0][0] <= self._num_steps:
            _, _, turn = heapq.heappop(self._decoding)
            self._end(turn)

    def _next_turn(self) -> Turn | None:
        """The turn whose prefill begins now.

        The first in the queue, unless its pages are still on their way from disk: then
        one behind it whose pages are there, as often as `max_passes` allows.
        """
        scheduler = self.scheduler
        if not scheduler.has_room:
            return None
        passed: list[Turn] = []
        for turn in scheduler.startable(1 + self.system.max_staged):
            if not turn.is_staged and not self._staging.stage(turn, self.clock):
                if passed or not self._staging.give_back():
                    break
                # Those behind it held the slots that it needs.
                if not self._staging.stage(turn, self.clock):
                    break
            if turn.ready_at <= self.clock:
                for other in passed:
                    other.num_passed += 1
                return turn
            passed.append(turn)
            if turn.num_passed >= self.system.max_passes:
                break
        return None

    def _prefill(self, turn: Turn) -> None:
        """Computes what is not reused, loading the rest meanwhile."""
        system, store = self.system, self.store
        pages = store.index.find(turn.session)
        start_s = self.clock
        self.scheduler.start(turn)
        self.placement.started(turn.session, turn.ticket, start_s)
        self._staging.start(turn)
        tokens_from = self._tokens_from(turn, pages)
        cached = sum(tokens_from)
        seconds, stall_s = self._prefill_seconds(turn, pages, cached)
        self.clock += seconds
        self.busy.prefill_s += seconds
        if system.reuse == "cached":
            num_full = turn.prompt_tokens // system.tokens_per_page
            store.release_slots(turn.num_slots)
            store.take(pages, (1 << num_full) - 1)
            # A tail that does not fill up lies in its slot already.
            turn.num_slots = num_pages(turn, system) - pages.device.bit_count()
            store.reserve_slots(turn.num_slots)
            # The page that the new tokens fill up is not the one that was stored.
            tail, filled = divmod(pages.num_tokens - 1, system.tokens_per_page)
            grown = 1 << tail if pages.num_tokens and filled else 0
            fresh = ((1 << num_full) - 1) & ~(grown | pages.host | pages.disk)
            if fresh.bit_count() >= SAVED_TOGETHER:
                store.save(pages, fresh, self.clock)
        self._note(turn, pages, tokens_from, start_s, seconds, stall_s)
        last = self._num_steps + turn.output_tokens - 1
        heapq.heappush(self._decoding, (last, next(self._tie), turn))

    def _end(self, turn: Turn) -> None:
        """The reply is complete: what it added is saved, its seat is free."""
        system, store = self.system, self.store
        pages = store.index.find(turn.session)
        size = system.tokens_per_page
        history = max(0, pages.num_tokens - 1)
        if history % size:
            # A page that the turn wrote into is another page now.
            store.replace(pages, 1 << (history // size))
        pages.num_tokens = turn.prompt_tokens + turn.output_tokens
        store.release_slots(turn.num_slots)
        self._truncation.after(pages)
        num_cached = -(-(pages.num_tokens - 1) // size)
        if system.reuse == "cached":
            mask = (1 << num_cached) - 1
            store.take(pages, mask)
            store.save(pages, mask, self.clock)
        pages.holds -= 1
        if self._histories is not None:
            self._histories[turn.session] = pages.num_tokens, pages.num_dropped
        returns_at = self._next_arrival(turn, self.clock)
        self._results["ended_s"][turn.row] = self.clock
        self.scheduler.finish(turn)
        kv_tokens = num_cached * size
        self.placement.ended(
            turn.session,
            self.clock,
            num_turns=turn.place + 1,
            num_tokens=pages.num_tokens,
            kv_bytes=kv_tokens * system.model.kv_bytes,
            returns_at=returns_at,
        )

    def _next_wake(self, has_started: bool) -> float | None:
        if has_started and self.scheduler.num_waiting:
            # The others get a step between two prefills.
            return self.clock + (self._step_s if self._decoding else 0.0)
        times = []
        if self._decoding:
            left = self._decoding[0][0] - self._num_steps
            times.append(self.clock + left * self._step_s)
        if self.scheduler.has_room:
            ready_at = self._staging.ready_at(self.clock)
            if ready_at is not None:
                times.append(ready_at)
        return min(times, default=None)

    # ---- parts of them ----

    def _tokens_from(self, turn: Turn, pages: Pages) -> tuple[int, int, int]:
        """Tokens of the prompt by the tier they come from."""
        size, mask = self.system.tokens_per_page, turn.mask
        history = max(0, pages.num_tokens - 1)
        device = mask & pages.device
        host = mask & pages.host & ~device
        disk = mask & ~(device | host)
        arrived_late = host & pages.arriving if turn.ready_at > turn.staged_s else 0
        host, disk = host & ~arrived_late, disk | arrived_late
        counts = [part.bit_count() * size for part in (device, host, disk)]
        over = sum(counts) - history
        if over > 0:  # the last page is partly filled
            last = 1 << (mask.bit_length() - 1)
            for index, part in enumerate((device, host, disk)):
                counts[index] -= over if part & last else 0
        return counts[0], counts[1], counts[2]

    def _prefill_seconds(
        self, turn: Turn, pages: Pages, cached: int
    ) -> tuple[float, float]:
        """Seconds of the prefill, and of those waited for loads."""
        system, model = self.system, self._cost_model
        num_new = turn.prompt_tokens - cached
        compute_s = model.prefill_s(num_new, cached) + system.prefill_overhead_s
        on_device = (turn.mask & pages.device).bit_count() * system.tokens_per_page
        num_bytes = max(0, cached - on_device) * system.model.kv_bytes
        if not num_bytes:
            return compute_s, 0.0
        self.store.links.to_device.carry(num_bytes, turn.staged_s)
        link = system.constants.host_to_device
        load_s = system.groups * link.latency_s + num_bytes / link.bytes_per_s
        load_s = max(load_s, turn.disk_s)
        if not system.is_preloading:
            return compute_s + load_s, load_s
        groups = system.groups
        ahead = read_buffer_groups(load_s / groups, compute_s / groups, groups)
        finish_s = float(
            equal_groups_finish_s(
                load_s / groups,
                compute_s / groups,
                num_groups=groups,
                read_ahead=ahead,
                lead_s=self.clock - turn.loads_from_s,
            )
        )
        return finish_s, finish_s - compute_s

    def _note(self, turn, pages, tokens_from, start_s, seconds, stall_s) -> None:
        row, columns = turn.row, self._results
        columns["device"][row], columns["host"][row], columns["disk"][row] = tokens_from
        history = max(0, pages.num_tokens - 1)
        recomputed = max(0, history - sum(tokens_from))
        columns["recomputed"][row] = recomputed
        columns["new"][row] = turn.prompt_tokens - sum(tokens_from) - recomputed
        columns["output"][row] = turn.output_tokens
        columns["arrived_s"][row] = turn.arrived_s
        columns["queue_s"][row] = start_s - turn.arrived_s
        columns["prefill_s"][row] = seconds
        columns["stall_s"][row] = stall_s
        columns["order"][row] = next(self._started)
        columns["place"][row] = turn.place
