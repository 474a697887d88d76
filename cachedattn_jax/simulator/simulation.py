"""Plays a trace on replicas in virtual time.

Knows events and which replica serves a turn. Does not know what a replica does.
"""

import heapq
import itertools
import time
from collections import Counter
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np

from cachedattn_jax.simulator.replica import Replica
from cachedattn_jax.simulator.results import Results, Simulated
from cachedattn_jax.simulator.simulated_staging import History
from cachedattn_jax.simulator.system import System
from cachedattn_jax.simulator.trace import Trace
from cachedattn_jax.simulator.turn import Turn

Routing = Literal["affinity", "random"]


class Simulation:
    """A trace and the replicas that serve it.

    Args:
        routing: "affinity" sends all turns of a session to one replica, "random" each
            turn to any.
        closes: whether users say that a conversation is over when it is.
        on_turns: called now and then with the number of turns that have ended.
    """

    def __init__(
        self,
        trace: Trace,
        system: System,
        *,
        num_replicas: int = 1,
        routing: Routing = "affinity",
        closes: bool = False,
        seed: int = 0,
        keeps_moves: bool = False,
        on_turns: Callable[[int], None] = lambda num: None,
    ) -> None:
        if num_replicas < 1:
            raise ValueError(f"num_replicas={num_replicas} must be at least 1")
        if routing not in get_args(Routing):
            raise ValueError(f"{routing=} is not one of {', '.join(get_args(Routing))}")
        self.trace = trace
        self.results = Results(trace.num_turns)
        started = itertools.count()
        is_shared = num_replicas > 1 and routing == "random"
        histories: dict[int, History] | None = {} if is_shared else None
        self.replicas = [
            Replica(
                system,
                self.results,
                started,
                self._next_arrival,
                histories=histories,
                keeps_moves=keeps_moves,
            )
            for _ in range(num_replicas)
        ]
        self._routing = routing
        self._closes = closes
        self._rng = np.random.default_rng(seed)
        self._on_turns = on_turns
        self._num_ended = 0
        self._order = itertools.count()
        self._turns: list[tuple[float, int, int, int]] = []  # that will come
        self._wakes: list[tuple[float, int, int]] = []
        self._wake_at: list[float] = [float("inf")] * num_replicas
        self._clock = 0.0
        # Plain lists: taking a number out of an array costs five times as much.
        self._first_row = trace.first_row.tolist()
        self._new = trace.new_tokens.tolist()
        self._output = trace.output_tokens.tolist()
        self._think_s = trace.think_s.tolist()

    def run(self) -> Simulated:
        """Plays all of it."""
        began, cpu_began = time.perf_counter(), time.process_time()
        arrivals = self.trace.arrival_s.tolist()
        next_session, num_sessions = 0, len(arrivals)
        turns, wakes = self._turns, self._wakes
        infinity = float("inf")
        while True:
            arrives = infinity
            if next_session < num_sessions:
                arrives = arrivals[next_session]
            returns = turns[0][0] if turns else infinity
            wakes_at = wakes[0][0] if wakes else infinity
            now = min(arrives, returns, wakes_at)
            if now == infinity:
                break
            # What users do comes before what is done about it.
            if arrives == now:
                self._submit(next_session, 0, now)
                next_session += 1
            elif returns == now:
                _, _, session, place = heapq.heappop(turns)
                self._submit(session, place, now)
            else:
                _, _, number = heapq.heappop(wakes)
                if self._wake_at[number] == wakes_at:
                    self._wake_at[number] = infinity
                    self._wake(number, now)
        assert all(replica.scheduler.is_idle for replica in self.replicas)
        return self._simulated(
            time.perf_counter() - began, time.process_time() - cpu_began
        )

    def _submit(self, session: int, place: int, now: float) -> None:
        row = self._first_row[session] + place
        turn = Turn(session, row, place, self._new[row], self._output[row], now)
        number = self._route(session)
        replica = self.replicas[number]
        tenants = self.trace.tenants
        replica.submit(turn, now, tenants[session] if tenants else "")
        if self.trace.is_open_loop:
            self._schedule(session, place + 1, now)
        if replica.scheduler.has_room:
            self._set_wake(number, max(now, replica.clock))

    def _wake(self, number: int, now: float) -> None:
        at = self.replicas[number].wake(now)
        if at is not None:
            self._set_wake(number, at)

    def _set_wake(self, number: int, at: float) -> None:
        if at < self._wake_at[number]:
            self._wake_at[number] = at
            heapq.heappush(self._wakes, (at, next(self._order), number))

    def _route(self, session: int) -> int:
        num = len(self.replicas)
        if num == 1:
            return 0
        if self._routing == "random":
            return int(self._rng.integers(num))
        return session % num

    def _schedule(self, session: int, place: int, since: float) -> float | None:
        """Puts the next turn of a session on the calendar; None if there is none."""
        row = self._first_row[session] + place
        if row >= self._first_row[session + 1]:
            return None
        at = since + self._think_s[row]
        heapq.heappush(self._turns, (at, next(self._order), session, place))
        return at

    def _next_arrival(self, turn: Turn, now: float) -> float | None:
        """Called when a turn ends."""
        self._num_ended += 1
        if self._num_ended % 500 == 0:
            self._on_turns(self._num_ended)
        is_last = turn.row + 1 == self._first_row[turn.session + 1]
        if is_last:
            if self._closes:
                self._close(turn.session)
            return None
        if self.trace.is_open_loop:
            return max(now, turn.arrived_s + self._think_s[turn.row + 1])
        return self._schedule(turn.session, turn.place + 1, now)

    def _close(self, session: int) -> None:
        chosen = self.replicas
        if self._routing == "affinity":
            chosen = [self.replicas[self._route(session)]]
        for replica in chosen:
            replica.placement.closed(session)

    def _simulated(self, wall_s: float, cpu_s: float) -> Simulated:
        counters: Counter[str] = Counter()
        moved: Counter[str] = Counter()
        for replica in self.replicas:
            counters.update(replica.store.counters)
            moved.update(replica.store.links.num_bytes())
        return Simulated(
            turns=self.results,
            busy=[replica.busy for replica in self.replicas],
            counters=dict(counters),
            bytes_moved=dict(moved),
            end_s=max(replica.clock for replica in self.replicas),
            wall_s=wall_s,
            cpu_s=cpu_s,
            moves=self.replicas[0].placement.moves or [],
        )
