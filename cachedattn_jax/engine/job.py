"""A turn that holds pages: what the engine keeps of it between steps.

Knows tokens, slots and what is under way. Does not know when it gets its turn.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cachedattn_jax.engine.cost_model import CostModel
from cachedattn_jax.engine.decision import Decision
from cachedattn_jax.engine.pipeline import exposed_stall_s
from cachedattn_jax.engine.plan import TurnPlan
from cachedattn_jax.engine.prefill_run import PrefillRun
from cachedattn_jax.engine.sampling import Sampled
from cachedattn_jax.engine.turn import Turn
from cachedattn_jax.store.chain import Chain
from cachedattn_jax.store.groupwise_save import GroupwiseSave
from cachedattn_jax.store.lease import Lease
from cachedattn_jax.store.link import Copy
from cachedattn_jax.store.page import PageKey, Tail
from cachedattn_jax.store.truncation import Context, Truncation, truncations_before
from cachedattn_jax.timeline import Timeline, busy_s


@dataclass(eq=False, kw_only=True)
class Job:
    """A turn with a lease.

    Attributes:
        page_table: int32 [pages_per_sequence], the lease's slots and then zeros.
        read_ahead: layer groups that may be copied before they are needed.
        chain: the pages of the tokens that the host knows.
        truncations: all that were dispatched, which the chain may not have reached yet.
        context: what they left.
        max_tokens: reply tokens at most.
        num_published: place in the conversation of the first token whose page cannot
            be found by other turns.
        is_overflowed: whether it waits for a prefill of what a truncation left.
        is_paused: whether it waits for slots that a truncation needs.
        num_passed: turns that started before it because its pages were on their way.
        seat: where its last token is on the device, once it runs.
        started_s: when it got it, seconds of the monotonic clock.
        num_dispatched: reply tokens whose computation was dispatched.
    """

    turn: Turn
    plan: TurnPlan
    decision: Decision
    lease: Lease
    page_table: np.ndarray
    read_ahead: int
    chain: Chain
    truncations: tuple[Truncation, ...] = ()
    context: Context = Context()
    max_tokens: int = 0
    num_published: int = 0
    is_overflowed: bool = False
    is_paused: bool = False
    num_passed: int = 0
    seat: int | None = None
    started_s: float = 0.0
    prefill: PrefillRun | None = None
    save: GroupwiseSave | None = None
    num_dispatched: int = 0

    @property
    def name(self) -> str:
        """How events call the turn."""
        return f"{self.turn.request.session_id}#{self.turn.turn_index}"

    @property
    def needs_tokens(self) -> bool:
        return self.num_dispatched < self.max_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of the conversation, those included that only the device knows."""
        return len(self.turn.prompt) + self.num_dispatched

    @property
    def context_tokens(self) -> int:
        """Those of them that the model sees."""
        return self.context.position(self.num_tokens)

    @property
    def token_ids(self) -> np.ndarray:
        """int32, the prompt and the reply so far."""
        return np.concatenate([self.turn.prompt, np.asarray(self.turn.reply, np.int32)])

    @property
    def num_known(self) -> int:
        """Tokens of the conversation that the host knows and that have keys and values:
        those of the last one are computed with the next.
        """
        return len(self.turn.prompt) + max(0, len(self.turn.reply) - 1)

    def truncate(self, truncation: Truncation) -> None:
        """Notes that something was dropped from the context."""
        self.truncations = (*self.truncations, truncation)
        self.context = self.context.without(truncation.dropped)
        self.turn.num_truncations += 1

    def follow(self) -> None:
        """Takes the chain up to what the host knows."""
        known = truncations_before(self.num_known, self.truncations)
        # One that rewrote pages was followed when it happened.
        known = self.truncations[: max(len(known), self.chain.num_truncations)]
        self.chain = self.chain.after(self.token_ids, known, self.num_known)

    def follow_rewrite(self) -> None:
        """Takes the chain past a truncation that rewrote pages: old keys are void."""
        at = self.truncations[-1].at
        self.chain = self.chain.after(self.token_ids, self.truncations, at)
        self.num_published = 0

    def unpublished(self) -> Iterator[tuple[int, PageKey, np.ndarray]]:
        """Place in the lease, key and tokens of pages that cannot be found yet."""
        step, token_ids = self.chain.layout.page_tokens, self.token_ids
        pages, context = self.chain.pages, self.chain.context
        first = bisect_left(pages, self.num_published, key=lambda page: page.token)
        for index, page in enumerate(pages[first:], first):
            place = self.place(page.token)
            if place is not None:
                tokens = context.tokens(index * step, (index + 1) * step)
                yield place, page.key, token_ids[tokens]
        self.num_published = context.token(step * len(pages))

    def tail(self) -> Tail | None:
        """The partly filled last page, at its place in the lease."""
        tail, chain = self.chain.tail(self.token_ids), self.chain
        if tail is None:
            return None
        first = chain.context.token(len(chain.pages) * chain.layout.page_tokens)
        place = self.place(first)
        return None if place is None else replace(tail, index=place)

    def place(self, token: int) -> int | None:
        """The page of the lease that begins with a token; None if it was dropped."""
        position = self.context.position(token)
        is_kept = self.context.token(position) == token
        return position // self.chain.layout.page_tokens if is_kept else None

    def abandon_save(self) -> None:
        """Gives up pages that leave group by group and are not all dispatched."""
        if self.save is not None:
            self.save.abandon()
            self.save = None

    def observe(self, cost_model: CostModel) -> None:
        """Lets the cost model learn from the prefill, whose events were noted."""
        assert self.prefill is not None
        inbound, cached = self.lease.inbound, self.lease.cached_tokens
        cost_model.observe_load("disk", *_flow(inbound.reads))
        cost_model.observe_load("host", *_flow(inbound.unhindered))
        if self.decision.choice == "recompute":
            cost_model.observe_no_load()
        if not inbound.loads:
            ((start, end),) = _in_order(self.prefill.computes)
            cost_model.observe_prefill(self.prefill.num_tokens, cached, end - start)

    def note_prefill(self, timeline: Timeline) -> None:
        """Measures the prefill, whose first token is known, and notes its events."""
        run, inbound, turn = self.prefill, self.lease.inbound, self.turn
        assert run is not None and turn.times.started_s is not None
        computes = _in_order(run.computes)
        reads = [copy.span for copy in inbound.reads]
        puts = [copy.span for copy in inbound.puts]
        started_s, ends = turn.times.started_s, [end for _, end in computes]
        needed = [puts[run.needed(group)][1] for group in range(len(puts))]
        turn.load_s = busy_s([*reads, *puts])
        turn.exposed_stall_s = exposed_stall_s(needed, ends[: len(puts)], started_s)
        turn.bytes_disk_to_host = sum(copy.num_bytes for copy in inbound.reads)
        turn.bytes_host_to_device = sum(copy.num_bytes for copy in inbound.puts)

        def add(name: str, track: str, spans: Sequence, sizes: Sequence | None) -> None:
            for index, (start, end) in enumerate(spans):
                details = {"bytes": sizes[index].num_bytes} if sizes else {}
                if name != "read" and inbound.loads:
                    details["group"] = index
                timeline.add(name, track, start, end, turn=self.name, **details)

        add("read", "disk to host", reads, inbound.reads)
        add("put", "host to device", puts, inbound.puts)
        add("install", "install", _in_order(run.installs), None)
        # A group computes when the one before has, and its pages are there.
        computes = [
            (min(max(start, needed[i]), end) if needed else start, end)
            for i, (start, end) in enumerate(computes)
        ]
        add("prefill", "compute", computes, None)
        for group, arrived in enumerate(needed):
            free = max([started_s, *ends[group - 1 : group]])
            if arrived > free:
                details = {"turn": self.name, "group": group}
                timeline.add("wait", "wait", free, arrived, **details)


def _flow(copies: Sequence[Copy]) -> tuple[int, float, int]:
    """Bytes, seconds during which any was under way, and how many."""
    seconds = busy_s(copy.span for copy in copies)
    return sum(copy.num_bytes for copy in copies), seconds, len(copies)


def _in_order(work: Sequence) -> list[tuple[float, float]]:
    """(start, end) of programs that run one after the other, as dispatched."""
    spans: list[tuple[float, float]] = []
    for dispatched_s, done in work:
        end = done.result()
        start = max(dispatched_s, spans[-1][1]) if spans else dispatched_s
        spans.append((min(start, end), end))
    return spans


@dataclass(frozen=True, kw_only=True)
class InFlight:
    """A dispatched program and whose tokens it brings, row by row."""

    jobs: list[Job]
    sampled: Sampled
    name: str
    start_s: float
