"""When sessions begin and how long users think. Knows no lengths."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from experiments.workload import Conversation


@dataclass(frozen=True, kw_only=True)
class Arrivals:
    """Sessions begin as a Poisson process; think times are lognormal.

    The paper has 1 session/s and says nothing of think times. The default median of
    exp(4.9) = 134 s is near the 126 s between turns of the Mooncake trace.

    Attributes:
        sessions_per_s: may be infinite, then all begin at 0.
        think_mu, think_sigma: mean and deviation of the log of the time in seconds.
    """

    sessions_per_s: float = 1.0
    think_mu: float = 4.9
    think_sigma: float = 1.0

    def __post_init__(self) -> None:
        if not self.sessions_per_s > 0:
            raise ValueError(f"sessions_per_s={self.sessions_per_s} must be positive")
        if not abs(self.think_mu) < 20:  # e^20 s = 15 years
            raise ValueError(
                f"think_mu={self.think_mu} is the log of seconds and must lie between"
                " -20 and 20"
            )
        if not 0 <= self.think_sigma < math.inf:
            raise ValueError(f"think_sigma={self.think_sigma} must be at least 0")

    def times(
        self, num_turns: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """When sessions of so many turns arrive, and a think time for every turn.

        At another rate or think time the same generator gives the same times,
        stretched; more sessions leave the times of the first as they are.
        """
        arrival_rng, think_rng = rng.spawn(2)
        gaps = arrival_rng.standard_exponential(len(num_turns))
        normal = think_rng.standard_normal(int(num_turns.sum()))
        think_s = np.exp(self.think_mu + self.think_sigma * normal)
        return np.cumsum(gaps) / self.sessions_per_s, think_s

    def schedule(
        self, conversations: Sequence[Conversation], rng: np.random.Generator
    ) -> tuple[Conversation, ...]:
        """Gives the conversations new times, in the order they stand in."""
        num_turns = np.array([len(c.turns) for c in conversations], np.int64)
        arrivals_s, thinks = self.times(num_turns, rng)
        think_s = iter(thinks.tolist())
        return tuple(
            replace(
                conversation,
                arrival_s=arrival_s,
                turns=tuple(
                    replace(turn, think_s=next(think_s) if index else 0.0)
                    for index, turn in enumerate(conversation.turns)
                ),
            )
            for conversation, arrival_s in zip(
                conversations, arrivals_s.tolist(), strict=True
            )
        )
