"""When idle conversations come back: an estimate that learns as it goes.

Knows durations. Does not know sessions' sizes or tiers.
"""

import math

import numpy as np

from cachedattn_jax.store.placement.standing import Standing

# Idle times are told apart by their logarithm, from a millisecond to eleven days.
_SHORTEST_S = 1e-3
_PER_DECADE = 8
_NUM_BINS = 9 * _PER_DECADE
EDGES_S = np.concatenate(
    [[0.0], _SHORTEST_S * 10 ** (np.arange(1, _NUM_BINS) / _PER_DECADE), [math.inf]]
)
# The last bin is open; it weighs as if it were as wide as all before it.
_WIDTHS_S = np.diff(np.append(EDGES_S[:-1], 2 * EDGES_S[-2]))
# What is believed before anything was seen: of those still idle, as many return while
# the time doubles as did while it doubled before. The share is small: with 1 / 12 a bin
# old conversations of which nothing is known yet looked better than fresh ones that
# do return (Mooncake's trace, first half hour).
_PRIOR_HAZARD = np.full(_NUM_BINS, 1 / 50)
# Observations that a prior counts as.
_PRIOR_WEIGHT = 12.0
# Idle times that are remembered one by one, and ended ones that weigh in full.
_MAX_IDLE = 100_000
_MAX_ENDED = 20_000


def bin_of(idle_s: float) -> int:
    """The bin that an idle time falls into."""
    if idle_s <= _SHORTEST_S:
        return 0
    return min(_NUM_BINS - 1, int(_PER_DECADE * math.log10(idle_s / _SHORTEST_S)))


class ReturnTimes:
    """Idle times of a class of conversations, ended and still going on.

    Attributes:
        num_ended: idle times that ended with a return, old ones weighing less.
    """

    def __init__(self) -> None:
        self._ended = np.zeros(_NUM_BINS)
        # Idle times whose end was not awaited, by the bin they had reached.
        self._given_up = np.zeros(_NUM_BINS)
        self._idle: dict[Standing, float] = {}  # since when, in this order

    @property
    def num_ended(self) -> float:
        return float(self._ended.sum())

    def rested(self, standing: Standing, now: float) -> None:
        """A conversation is idle from now on."""
        self._idle[standing] = now

    def returned(self, standing: Standing, now: float) -> None:
        """Its next turn came."""
        since = self._idle.pop(standing, None)
        if since is not None:
            self._ended[bin_of(now - since)] += 1

    def forgot(self, standing: Standing) -> None:
        """Its idle time does not count, neither as ended nor as going on."""
        self._idle.pop(standing, None)

    def counts(self, now: float) -> np.ndarray:
        """By bin, [2, bins]: those that returned in it, and those that came so far.

        An idle time that goes on counts up to where it is, so that conversations which
        are over are not missed.
        """
        if self._ended.sum() > _MAX_ENDED:
            self._ended /= 2
            self._given_up /= 2
        while len(self._idle) > _MAX_IDLE:
            standing = next(iter(self._idle))
            self._given_up[bin_of(now - self._idle.pop(standing))] += 1
        since = np.fromiter(self._idle.values(), float, len(self._idle))
        # Ages fall with the time since, which rises.
        passed = np.searchsorted(since, now - EDGES_S[1:], side="right")
        ended_later = self._ended[::-1].cumsum()[::-1]
        given_up_later = self._given_up[::-1].cumsum()[::-1] - self._given_up
        at_risk = ended_later + given_up_later + passed
        return np.stack([self._ended, at_risk])


def hazard(counts: np.ndarray, prior: np.ndarray = _PRIOR_HAZARD) -> np.ndarray:
    """By bin: the chance to return in it, for one still idle at its beginning.

    The product-limit estimate (Kaplan and Meier, 1958), drawn towards a prior.
    """
    ended, at_risk = counts
    return (ended + _PRIOR_WEIGHT * prior) / (at_risk + _PRIOR_WEIGHT)


def return_rates(hazard: np.ndarray) -> np.ndarray:
    """By bin: the best rate of returns, per second of waiting for them from there on.

    A conversation may be kept until any later time and then given up. Over a horizon it
    returns with some chance and is held for some expected time; the rate is the largest
    ratio of the two (an index in the sense of Gittins, 1979). Who has the lowest rate
    for its size should go: holding the others brings more.
    """
    survival = np.concatenate([[1.0], np.cumprod(1 - hazard[:-1])])
    chance = np.cumsum(survival * hazard)
    held_s = np.cumsum(survival * _WIDTHS_S * (1 - hazard / 2))
    before = np.arange(_NUM_BINS)
    chance_from = chance[None, :] - np.concatenate([[0.0], chance[:-1]])[:, None]
    held_from = held_s[None, :] - np.concatenate([[0.0], held_s[:-1]])[:, None]
    is_later = before[None, :] >= before[:, None]
    ratio = np.where(is_later, chance_from / np.maximum(held_from, 1e-12), 0.0)
    return ratio.max(axis=1)
