"""Which idle conversation is worth least: chances of return against size."""

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from sortedcontainers import SortedDict

from cachedattn_jax.store.placement.policy import Policy
from cachedattn_jax.store.placement.return_times import (
    ReturnTimes,
    bin_of,
    hazard,
    return_rates,
)
from cachedattn_jax.store.placement.standing import Standing
from cachedattn_jax.store.placement.tier import TIERS, Tier

# Classes: finished turns up to powers of two, the last without end, and sizes by powers
# of this.
_NUM_TURN_CLASSES = 6
_SIZE_RATIO = 1.5
_PER_LOG_SIZE = 1 / math.log(_SIZE_RATIO)
# Tenants that get classes of their own; all others share theirs.
_MAX_TENANTS = 8
# The estimate is made anew when the events since have grown by this share.
_REFRESH = 0.1
_FIRST_REFRESH = 64
# The classes are ranked anew when so much of the last victim's idle time has passed.
_RANK_AGAIN = 0.02
# And not more of them for each event than this.
_RANKED_PER_EVENT = 4

# Tenant, and finished turns with size: see `_kind`.
_ClassKey = tuple[str, int]


@dataclass(eq=False)
class _Class:
    """Conversations that are taken to behave alike.

    Attributes:
        number: its place among the classes.
        turns: class of its finished turns.
        ranked: by tier in whose ranking it stands, the value that it stands there by.
        rates: by bin of the idle time, returns per second of being held.
        rises: whether a fresh conversation can be worth less than an older one.
        orders: by tier, its idle sessions by the time since when they are.
        mean_bytes, mean_tokens: of a session when it became idle, moving.
    """

    number: int
    turns: int
    ranked: dict[Tier, float] = field(default_factory=dict)
    times: ReturnTimes = field(default_factory=ReturnTimes)
    worth: list[float] = field(default_factory=list)
    rises: bool = False
    orders: dict[Tier, SortedDict] = field(
        default_factory=lambda: {tier: SortedDict() for tier in TIERS}
    )
    mean_bytes: float = 0.0
    mean_tokens: float = 0.0

    def note_size(self, standing: Standing) -> None:
        weight = 0.02 if self.mean_bytes else 1.0
        self.mean_bytes += weight * (standing.kv_bytes - self.mean_bytes)
        self.mean_tokens += weight * (standing.num_tokens - self.mean_tokens)


class BestValue(Policy):
    """The idle session of least value for its size goes first.

    A session's value is its rate of return, see `return_rates`, times the benefit of a
    hit, over its bytes. Rates are learnt by class: finished turns, size and tenant. In
    a class only the longest and the shortest idle session can have the least value, so
    a decision looks at two sessions of each class.

    Args:
        token_weight: the benefit of a hit is tokens to this power: 0 counts turns, 1
            tokens.
    """

    def __init__(self, token_weight: float = 0.0) -> None:
        self._token_weight = token_weight
        self._classes: dict[_ClassKey, _Class] = {}
        self._tenants: set[str] = set()
        self._first_worth = return_rates(hazard(ReturnTimes().counts(0.0))).tolist()
        self._num_events = 0
        self._next_refresh = 0
        # By tier: (value of the worst session, number, class), a heap. Entries whose
        # value is not the one that the class stands by any more are passed over.
        self._ranking: dict[Tier, list[tuple[float, int, _Class]]] = {
            tier: [] for tier in TIERS
        }
        self._ranked_at = dict.fromkeys(TIERS, -math.inf)
        self._ranked_after = dict.fromkeys(TIERS, 0)
        self._last_idle_s = dict.fromkeys(TIERS, 0.0)

    def entered(self, standing: Standing, tier: Tier) -> None:
        of = self._class(standing)
        of.orders[tier][standing.used_at, standing.born] = standing
        if tier not in of.ranked:
            self._rank(of, tier, standing.used_at)

    def left(self, standing: Standing, tier: Tier) -> None:
        of = self._class(standing)
        del of.orders[tier][standing.used_at, standing.born]

    def rested(self, standing: Standing, now: float) -> None:
        of = self._class(standing)
        of.note_size(standing)
        of.times.rested(standing, now)
        self._num_events += 1

    def returned(self, standing: Standing, now: float) -> None:
        of = self._class(standing)
        of.times.returned(standing, now)
        self._num_events += 1

    def closed(self, standing: Standing) -> None:
        # Or those that are left, which do come back, would look like it.
        self._class(standing).times.forgot(standing)

    def victims(
        self, tier: Tier, now: float, first_ticket: int | float = 0
    ) -> Iterator[Standing]:
        is_old = self._is_ranking_old(tier, now)
        if self._num_events >= self._next_refresh:
            self._refresh(now)
            is_old = True
        if is_old:
            self._rank_all(tier, now)
        heap = self._ranking[tier]
        # Sessions of a class that were given out already: from the front, from the end.
        given: dict[_Class, tuple[int, int]] = {}
        try:
            while heap:
                value, _, of = heap[0]
                if of.ranked.get(tier) != value:
                    heapq.heappop(heap)
                    continue
                front, back = given.get(of, (0, 0))
                worst = self._worst(of, tier, now, front, back)
                if worst is None:
                    heapq.heappop(heap)
                    del of.ranked[tier]
                    continue
                current, is_youngest, standing = worst
                # A class is ranked by what its worst session was worth a while ago.
                if current > value and len(heap) > 1:
                    heapq.heapreplace(heap, (current, of.number, of))
                    of.ranked[tier] = current
                    if heap[0][2] is not of:
                        continue
                given[of] = (front, back + 1) if is_youngest else (front + 1, back)
                self._last_idle_s[tier] = now - standing.used_at
                yield standing
        finally:
            # Whoever asked may have taken none of them.
            for of in given:
                if of.orders[tier]:
                    self._rank(of, tier, now)

    def _is_ranking_old(self, tier: Tier, now: float) -> bool:
        """Whether values have changed, and events since pay for looking at them all."""
        num_events = self._num_events - self._ranked_after[tier]
        if num_events * _RANKED_PER_EVENT < len(self._classes):
            return False
        return now - self._ranked_at[tier] > _RANK_AGAIN * self._last_idle_s[tier]

    def _rank_all(self, tier: Tier, now: float) -> None:
        self._ranking[tier].clear()
        self._ranked_at[tier] = now
        self._ranked_after[tier] = self._num_events
        heap = self._ranking[tier]
        for of in self._classes.values():
            of.ranked.pop(tier, None)
            worst = self._worst(of, tier, now, 0, 0)
            if worst is not None:
                of.ranked[tier] = worst[0]
                heap.append((worst[0], of.number, of))
        heapq.heapify(heap)

    def _rank(self, of: _Class, tier: Tier, now: float) -> None:
        """Puts a class in its place among those with idle sessions in the tier."""
        worst = self._worst(of, tier, now, 0, 0)
        assert worst is not None
        if of.ranked.get(tier) == worst[0]:
            return
        of.ranked[tier] = worst[0]
        heapq.heappush(self._ranking[tier], (worst[0], of.number, of))

    def _worst(
        self, of: _Class, tier: Tier, now: float, front: int, back: int
    ) -> tuple[float, bool, Standing] | None:
        """The session of least value in a class, with some at both ends left out.

        Returns:
            Its value, and whether it is the youngest; None if all are left out.
        """
        order = of.orders[tier]
        left = len(order) - front - back
        if left < 1:
            return None
        oldest, standing = order.peekitem(front)
        value = of.worth[bin_of(now - oldest[0])]
        if of.rises and left > 1:
            youngest, other = order.peekitem(-1 - back)
            other_value = of.worth[bin_of(now - youngest[0])]
            if other_value < value:
                return other_value, True, other
        return value, False, standing

    def _class(self, standing: Standing) -> _Class:
        kind, tenant = standing.kind, standing.tenant
        if kind is None:
            kind = standing.kind = _kind(standing)
        if tenant not in self._tenants:
            if len(self._tenants) < _MAX_TENANTS:
                self._tenants.add(tenant)
            else:
                tenant = ""
        found = self._classes.get((tenant, kind))
        if found is None:
            number, turns = len(self._classes), kind % _NUM_TURN_CLASSES
            found = self._classes[tenant, kind] = _Class(number, turns)
            found.worth = self._first_worth
            self._next_refresh = self._num_events
        return found

    def _refresh(self, now: float) -> None:
        counts = {of: of.times.counts(now) for of in self._classes.values()}
        # Few were seen of most classes: they are drawn towards all with as many turns.
        by_turns: dict[int, np.ndarray] = {}
        for of, found in counts.items():
            by_turns[of.turns] = by_turns.get(of.turns, 0.0) + found
        priors = {turns: hazard(found) for turns, found in by_turns.items()}
        for of, found in counts.items():
            rates = return_rates(hazard(found, priors[of.turns]))
            benefit = of.mean_tokens**self._token_weight
            of.worth = (rates * (benefit / max(1.0, of.mean_bytes))).tolist()
            of.rises = bool(rates[0] < rates.max())
        self._next_refresh = self._num_events + max(
            _FIRST_REFRESH, int(_REFRESH * min(self._num_events, 20_000))
        )


def _kind(standing: Standing) -> int:
    """Finished turns and size as one number; the turns are what is left of a division
    by their classes.
    """
    turns = min(max(0, standing.num_turns - 1).bit_length(), _NUM_TURN_CLASSES - 1)
    size = int(math.log(max(1, standing.num_tokens)) * _PER_LOG_SIZE)
    return size * _NUM_TURN_CLASSES + turns
