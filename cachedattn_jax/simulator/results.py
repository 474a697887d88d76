"""What a simulation leaves: a row for each turn, and sums. Knows no events."""

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from cachedattn_jax.store.placement.placement import Move

_COUNTS = ("device", "host", "disk", "recomputed", "new", "output")
_SECONDS = ("arrived_s", "queue_s", "prefill_s", "stall_s", "ended_s")


@dataclass(kw_only=True)
class Busy:
    """What the accelerators did, in seconds.

    Attributes:
        prefill_s: prefills, their stalls included.
        decode_s: decode steps.
        overflow_s: computing truncated contexts anew in the middle of a reply.
    """

    prefill_s: float = 0.0
    decode_s: float = 0.0
    overflow_s: float = 0.0


class Results:
    """Columns with a row for each turn of a trace, in the trace's order.

    `device`, `host`, `disk`, `recomputed` and `new` are tokens of the prompt by where
    they came from; `order` is the place among all turns by when they started.
    """

    def __init__(self, num_turns: int) -> None:
        zeros = [0] * num_turns
        self.columns: dict[str, array] = {
            **{name: array("i", zeros) for name in _COUNTS},
            **{name: array("d", zeros) for name in _SECONDS},
            "order": array("i", zeros),
            "place": array("i", zeros),
        }

    def __getitem__(self, name: str) -> np.ndarray:
        return np.asarray(self.columns[name])

    def __len__(self) -> int:
        return len(self.columns["new"])


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """A trace that was played.

    Attributes:
        busy: of each replica.
        counters, bytes_moved: summed over the replicas.
        wall_s, cpu_s: real seconds that it took, and those of one core.
    """

    turns: Results
    busy: list[Busy]
    counters: Mapping[str, int]
    bytes_moved: Mapping[str, float]
    end_s: float
    wall_s: float
    cpu_s: float
    moves: list[Move] = field(default_factory=list)

    def measured(self, num_warm_up: int = 0, num_turns: int | None = None) -> "Window":
        """The turns that started after the first `num_warm_up`, `num_turns` of them."""
        order = self.turns["order"]
        end = len(order) if num_turns is None else num_warm_up + num_turns
        return Window(self.turns, (order >= num_warm_up) & (order < end))

    def between(self, from_s: float, until_s: float) -> "Window":
        """The turns that came between two times."""
        arrived_s = self.turns["arrived_s"]
        return Window(self.turns, (arrived_s >= from_s) & (arrived_s < until_s))


class Window:
    """Measures over some turns of a simulation."""

    def __init__(self, turns: Results, chosen: np.ndarray) -> None:
        self._turns, self._chosen = turns, chosen

    def __getitem__(self, name: str) -> np.ndarray:
        return self._turns[name][self._chosen]

    @property
    def num_turns(self) -> int:
        return int(self._chosen.sum())

    def hit_rate(
        self, tier: str | None = None, *, by: str = "turns", counts_first: bool = True
    ) -> float:
        """Share of turns, or of history tokens, that found their cache.

        A turn that finds a part of its history counts as that part.

        Args:
            tier: in this tier only.
            by: "turns" or "tokens".
            counts_first: whether first turns, which have no history, count as misses;
                otherwise they do not count.
        """
        found = self._tokens(("device", "host", "disk") if tier is None else (tier,))
        cached = self._tokens(("device", "host", "disk"))
        history = cached + self["recomputed"]
        if by == "tokens":
            base = history + (self["new"] * (history == 0) if counts_first else 0)
            return float(found.sum() / max(1.0, base.sum()))
        is_later = history > 0
        share = found[is_later] / history[is_later]
        num_turns = self.num_turns if counts_first else int(is_later.sum())
        return float(share.sum() / max(1, num_turns))

    def _tokens(self, sources: tuple[str, ...]) -> np.ndarray:
        return np.stack([self[name] for name in sources]).sum(axis=0, dtype=np.float64)

    def ttft(self, *, with_queue: bool) -> dict[str, float]:
        """Seconds to the first token: mean and percentiles."""
        seconds = self["prefill_s"] + (self["queue_s"] if with_queue else 0.0)
        if not len(seconds):
            return dict.fromkeys(("mean", "p50", "p95", "p99"), float("nan"))
        p50, p95, p99 = np.percentile(seconds, (50, 95, 99))
        return {
            "mean": float(seconds.mean()),
            "p50": float(p50),
            "p95": float(p95),
            "p99": float(p99),
        }

    @property
    def prompt_tokens(self) -> float:
        names = ("device", "host", "disk", "recomputed", "new")
        return float(sum(self[name].sum(dtype=np.float64) for name in names))

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens over prefill time."""
        return self.prompt_tokens / max(1e-12, float(self["prefill_s"].sum()))
