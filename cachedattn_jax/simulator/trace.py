"""Who asks what, and when: a workload as columns of numbers, for millions of turns.

Knows lengths and times. Does not know tokens or systems.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Conversations in order of arrival, their turns one after the other.

    Attributes:
        arrival_s: [sessions], of the first turns.
        first_row: [sessions + 1], where the turns of a session begin in the columns.
        new_tokens, output_tokens: [turns].
        think_s: [turns], how long before a turn comes; 0 for first turns.
        is_open_loop: think times run from the arrival of the turn before; otherwise
            from the end of its reply.
        tenants: [sessions], by name; None for one tenant.
    """

    name: str
    arrival_s: np.ndarray
    first_row: np.ndarray
    new_tokens: np.ndarray
    output_tokens: np.ndarray
    think_s: np.ndarray
    is_open_loop: bool = False
    tenants: Sequence[str] | None = None

    def __post_init__(self) -> None:
        num_turns = len(self.new_tokens)
        if not len(self.arrival_s) or not num_turns:
            raise ValueError(f"trace {self.name!r} holds no turn")
        for name in ("output_tokens", "think_s"):
            if len(getattr(self, name)) != num_turns:
                raise ValueError(
                    f"trace {self.name!r}: {name} has {len(getattr(self, name))} rows,"
                    f" new_tokens has {num_turns}"
                )
        rows = self.first_row
        if len(rows) != self.num_sessions + 1 or rows[0] or rows[-1] != num_turns:
            raise ValueError(
                f"trace {self.name!r}: first_row must have {self.num_sessions + 1}"
                f" places from 0 to {num_turns}"
            )
        self._check("a session without turns", np.diff(rows) < 1, "session")
        self._check("tokens below 1", self.new_tokens < 1, "turn")
        self._check("a reply below 1 token", self.output_tokens < 1, "turn")
        self._check("a negative think time", ~(self.think_s >= 0), "turn")
        self._check("an endless think time", ~np.isfinite(self.think_s), "turn")
        self._check("a negative arrival", ~(self.arrival_s >= 0), "session")
        self._check("an endless arrival", ~np.isfinite(self.arrival_s), "session")
        unsorted = np.diff(self.arrival_s, prepend=0.0) < 0
        self._check("an arrival before that of the session above", unsorted, "session")
        if self.tenants is not None and len(self.tenants) != self.num_sessions:
            raise ValueError(f"trace {self.name!r}: tenants must name every session's")

    @property
    def num_sessions(self) -> int:
        return len(self.arrival_s)

    @property
    def num_turns(self) -> int:
        return len(self.new_tokens)

    @property
    def turns_per_session(self) -> np.ndarray:
        return np.diff(self.first_row)

    def slower(self, factor: float) -> "Trace":
        """The same turns with all times between them `factor` times as long."""
        if not 0 < factor < np.inf:
            raise ValueError(f"{factor=} must be a positive number")
        return replace(
            self, arrival_s=self.arrival_s * factor, think_s=self.think_s * factor
        )

    def _check(self, what: str, is_wrong: np.ndarray, unit: str) -> None:
        if is_wrong.any():
            number = int(np.flatnonzero(is_wrong)[0])
            raise ValueError(f"trace {self.name!r}: {unit} {number} has {what}")
