"""One engine in virtual time: turns wait, load, prefill, decode and end.

Knows the order of things, as `engine.loop` and `engine.staging` do. Does not know pages
or policies. The device computes one prefill at a time, which decodes wait for, and
decodes all running turns together; a turn waits for the step that runs when it comes.
"""

import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

from cachedattn_jax.engine.cost_model import CostModel
from cachedattn_jax.engine.pipeline import equal_groups_finish_s, read_buffer_groups
from cachedattn_jax.engine.scheduler import Scheduler
from cachedattn_jax.engine.truncation import pages_to_drop
from cachedattn_jax.simulator.results import Busy, Results
from cachedattn_jax.simulator.simulated_store import Pages, SimulatedStore
from cachedattn_jax.simulator.system import System
from cachedattn_jax.store.budget import SAVED_TOGETHER
from cachedattn_jax.store.placement.placement import Placement


@dataclass(slots=True, eq=False)
class Turn:
    """One turn on its way through a replica.

    Attributes:
        row: in the columns of the results.
        place: in its session, from 0.
        ready_at: when enough of the pages that it waits for have come from disk.
        disk_s: how long reading them takes in all.
        loads_from_s: since when its pages travel.
        mask: pages that it reuses.
    """

    session: int
    row: int
    place: int
    new_tokens: int
    output_tokens: int
    arrived_s: float
    ticket: int = 0
    mask: int = 0
    ready_at: float = 0.0
    disk_s: float = 0.0
    loads_from_s: float = 0.0
    staged_s: float = 0.0
    prompt_tokens: int = 0
    num_slots: int = 0
    num_passed: int = 0
    is_staged: bool = False


# Tokens of a conversation, and those dropped from its front: two that agree mean the
# same pages.
History = tuple[int, int]


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
        self._staged: dict[Turn, None] = {}

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
            if not turn.is_staged and not self._stage(turn):
                if passed or not self._unstage_others():
                    break
                # Those behind it held the slots that it needs.
                if not self._stage(turn):
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
        pages = store.sessions[turn.session]
        start_s = self.clock
        self.scheduler.start(turn)
        self.placement.started(turn.session, turn.ticket, start_s)
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
            turn.num_slots = self._num_pages(turn) - pages.device.bit_count()
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
        pages = store.sessions[turn.session]
        size = system.tokens_per_page
        history = max(0, pages.num_tokens - 1)
        if history % size:
            # A page that the turn wrote into is another page now.
            store.replace(pages, 1 << (history // size))
        pages.num_tokens = turn.prompt_tokens + turn.output_tokens
        store.release_slots(turn.num_slots)
        self._truncate_after(pages)
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
            ready = [t.ready_at for t in self._staged if t.ready_at > self.clock]
            if ready:
                times.append(min(ready))
        return min(times, default=None)

    # ---- parts of them ----

    def _unstage_others(self) -> bool:
        """Whether waiting turns gave back slots."""
        staged, self._staged = self._staged, {}
        for turn in staged:
            self.store.release_slots(turn.num_slots)
            self.store.pages(turn.session).holds -= 1
            turn.is_staged, turn.num_slots, turn.ready_at = False, 0, 0.0
        return bool(staged)

    def _stage(self, turn: Turn) -> bool:
        """Looks up what is stored of a turn and begins to read it from disk."""
        system, store = self.system, self.store
        pages = store.pages(turn.session)
        if self._histories is not None:
            store.catch_up(pages, *self._histories.get(turn.session, (0, 0)))
        self._truncate_before(turn, pages)
        turn.prompt_tokens = pages.num_tokens + turn.new_tokens
        store.arrive(pages, self.clock)
        mask = 0 if system.reuse == "recompute" else store.reusable(pages)
        if pages.is_stale:
            # As in the paper, every session is saved; that what is stored is of no use
            # shows when it is needed.
            store.drop(pages)
            mask, pages.is_stale = 0, False
        if system.is_deciding and mask:
            mask = self._decided(turn, pages, mask)
        pages.holds += 1
        if system.keeps_on_device:
            missing = self._num_pages(turn) - (mask & pages.device).bit_count()
            if not store.free_slots(missing, self.clock):
                pages.holds -= 1
                return False
            turn.num_slots = missing
            store.reserve_slots(missing)
        turn.mask, turn.is_staged, turn.staged_s = mask, True, self.clock
        if not system.max_staged:
            turn.loads_from_s = self.clock
        from_disk = mask & pages.disk & ~(pages.host | pages.device)
        if mask & pages.arriving:
            turn.ready_at = pages.arrives_at
        if from_disk:
            self._read(turn, pages, from_disk)
        if turn.ready_at > self.clock:
            self._staged[turn] = None
        return True

    def _read(self, turn: Turn, pages: Pages, mask: int) -> None:
        """Reads pages from disk; the turn may begin when enough groups have come."""
        system, store = self.system, self.store
        begins = max(self.clock, store.from_disk.free_at)
        num_bytes = store.num_bytes(pages, mask.bit_count())
        turn.disk_s = store.from_disk.carry(num_bytes, self.clock) - begins
        turn.loads_from_s = begins
        cached = turn.mask.bit_count() * system.tokens_per_page
        num_new = max(1, turn.prompt_tokens - cached)
        compute_s = self._cost_model.prefill_s(num_new, max(0, cached))
        groups = system.groups
        ahead = read_buffer_groups(turn.disk_s / groups, compute_s / groups, groups)
        ready_at = begins + turn.disk_s * ahead / groups
        turn.ready_at = max(turn.ready_at, ready_at)

    def _decided(self, turn: Turn, pages: Pages, mask: int) -> int:
        """What of the stored beginning is worth loading."""
        size, num = self.system.tokens_per_page, mask.bit_count()
        sources = []
        for page in range(num):
            bit = 1 << page
            is_near = pages.host & bit and not pages.arriving & bit
            near = "host" if is_near else "disk"
            sources.append("device" if pages.device & bit else near)
        tail = (pages.num_tokens - 1) % size
        is_tail = num * size > pages.num_tokens - 1
        decision = self._cost_model.decide(
            sources, turn.prompt_tokens, tail_tokens=tail if is_tail else 0
        )
        return (1 << decision.num_pages) - 1

    def _num_pages(self, turn: Turn) -> int:
        """Pages that the turn may grow to; a reply past the window truncates it."""
        num_tokens = turn.prompt_tokens + turn.output_tokens
        num_pages = -(-num_tokens // self.system.tokens_per_page)
        return min(num_pages, self.system.window_pages)

    def _tokens_from(self, turn: Turn, pages: Pages) -> tuple[int, int, int]:
        """Tokens of the prompt by the tier they come from."""
        self._staged.pop(turn, None)
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
        self.store.to_device.carry(num_bytes, turn.staged_s)
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

    def _truncate_before(self, turn: Turn, pages: Pages) -> None:
        """Makes room in the window for the prompt, and a token of the reply."""
        window = self.system.model.window
        if pages.num_tokens + turn.new_tokens < window:
            return
        while pages.num_tokens + turn.new_tokens >= window and pages.num_tokens:
            self._truncate(pages)
        turn.new_tokens = min(turn.new_tokens, window - 1)

    def _truncate_after(self, pages: Pages) -> None:
        """Makes room in the window for a reply that ran past it."""
        system = self.system
        if pages.num_tokens <= system.model.window:
            return
        while pages.num_tokens > system.model.window:
            self._truncate(pages)
        if system.reuse == "recompute" or system.overflow == "invalidate":
            # What remains is computed anew before the reply goes on.
            seconds = self._cost_model.prefill_s(max(1, pages.num_tokens), 0)
            self.busy.overflow_s += seconds

    def _truncate(self, pages: Pages) -> None:
        system = self.system
        dropped = max(1, int(system.truncation_ratio * system.model.window))
        size = system.tokens_per_page
        if system.overflow == "invalidate":
            pages.is_stale = True
        elif system.allocation == "held":
            dropped = pages_to_drop(system.model.window, size, system.truncation_ratio)
            dropped *= size
            self.store.shift(pages, dropped // size)
        pages.num_tokens = max(0, pages.num_tokens - dropped)
        pages.num_dropped += dropped

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
