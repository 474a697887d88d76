"""What a turn would hold if it were leased now: its plan, stored pages, a decision.

Knows records, stored pages and the cost of loading. Holds nothing.
"""

from dataclasses import dataclass

from cachedattn_jax.engine.cost_model import CostModel
from cachedattn_jax.engine.decision import Decision
from cachedattn_jax.engine.engine_config import EngineConfig
from cachedattn_jax.engine.plan import TurnPlan, plan_inexact, plan_turn
from cachedattn_jax.engine.turn import Turn
from cachedattn_jax.store.page_index import PageEntry
from cachedattn_jax.store.tiered_store import TieredStore


@dataclass(frozen=True, kw_only=True)
class Prospect:
    """What a waiting turn would hold if it were leased now."""

    plan: TurnPlan
    found: list[PageEntry]
    decision: Decision

    @property
    def num_pages(self) -> int:
        """Pages the turn may grow to, the window not considered."""
        step = self.plan.whole.layout.page_tokens
        return -(-(self.plan.context_tokens + self.plan.max_tokens) // step)

    @property
    def has_loads(self) -> bool:
        return any(entry.slot is None for entry in self.found)


class Prospects:
    """Looks up what is stored of turns and what to make of it."""

    def __init__(
        self,
        config: EngineConfig,
        window: int,
        store: TieredStore,
        cost_model: CostModel,
    ) -> None:
        self._config = config
        self._window = window
        self._store = store
        self._cost_model = cost_model

    def of(self, turn: Turn) -> Prospect:
        """What a waiting turn would hold; ValueError if it cannot be served."""
        request, store = turn.request, self._store
        record = store.catalog.find(request.tenant, request.session_id)
        turn.turn_index = 0 if record is None else record.num_turns
        truncation = self._config.truncation
        salt = store.salts.of(request.tenant)
        plan = plan_turn(store.layout, truncation, self._window, request, record, salt)
        return self.of_plan(turn, plan)

    def of_plan(self, turn: Turn, plan: TurnPlan) -> Prospect:
        """The same for a turn that was laid out."""
        plan, found = self._find(turn, plan)
        limit = self._config.truncation.max_replay_tokens
        if limit is not None and plan.num_replayed > limit:
            plan = plan_inexact(self._config.truncation, self._window, plan)
            plan, found = self._find(turn, plan)
        decision = self._decide(plan, found)
        if decision.num_pages < len(found):
            fewer, keys = plan.before(decision.num_pages), [e.key for e in found]
            if fewer.needs_no_more(keys[: decision.num_pages]):
                plan, found = fewer, found[: decision.num_pages]
            else:
                decision = Decision.kept(len(found))
        return Prospect(plan=plan, found=found, decision=decision)

    def _find(self, turn: Turn, plan: TurnPlan) -> tuple[TurnPlan, list[PageEntry]]:
        """Where computing can start from what is stored, and the pages it needs."""
        while True:
            found: list[PageEntry] = []
            if self._config.reuse == "cached":
                found = self._store.finder.find(
                    turn.session, plan.stored.keys, plan.tail, plan.stored_tokens
                )
            if self._config.loading == "never":
                found = found[: _num_resident(found)]
            if plan.tail is not None and found and found[-1].key == plan.tail.key:
                return plan.from_tail(), found
            plan = plan.before(len(found))
            if plan.needs_no_more([entry.key for entry in found]):
                return plan, found

    def _decide(self, plan: TurnPlan, found: list[PageEntry]) -> Decision:
        forced = {"always": len(found), "never": _num_resident(found)}
        if self._config.loading in forced:
            return Decision.forced(self._config.loading, forced[self._config.loading])
        is_tail = plan.tail is not None and len(found) > plan.tail.index
        return self._cost_model.decide(
            list(filter(None, [entry.nearest for entry in found])),
            plan.context_tokens,
            tail_tokens=len(plan.tail.token_ids) if is_tail and plan.tail else 0,
            copied=copied(found),
        )


def _num_resident(found: list[PageEntry]) -> int:
    """Pages at the beginning that lie on the device."""
    return next((i for i, entry in enumerate(found) if entry.slot is None), len(found))


def copied(found: list[PageEntry]) -> list[int]:
    """Pages that travel for each page, and not already for one before it."""
    runs: set[int] = set()
    copied = []
    for entry in found:
        slab = entry.slab
        if entry.slot is not None:
            copied.append(0)
        elif slab is None:
            copied.append(1)
        elif id(slab) in runs:
            copied.append(0)
        else:
            copied.append(slab.num_rows)
            runs.add(id(slab))
    return copied
