"""Sums over all turns that have ended. Knows turns; pure, no arrays and no clock."""

from bisect import bisect_left
from collections import Counter
from dataclasses import asdict

from cachedattn_jax.engine.turn import Turn

# Upper bounds in seconds, those of other servers' time-to-first-token histograms.
BOUNDS_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12)
BOUNDS_S += (10.24, 20.48, 40.96, 81.92)


class Histogram:
    """How many of some times fell below each bound.

    Attributes:
        counts: for each of `BOUNDS_S`, those above the bound before it; the last one
            has those above all bounds.
    """

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.sum_s += seconds


class Totals:
    """What all turns of an engine came to.

    Attributes:
        prompt_tokens: by source; the sources add up to all prompts.
        turns: by how they ended.
        times: histograms by name.
    """

    def __init__(self) -> None:
        self.prompt_tokens: Counter[str] = Counter()
        self.reply_tokens = 0
        self.turns: Counter[str] = Counter()
        self.decisions: Counter[str] = Counter()
        names = ("ttft", "queue", "latency", "exposed_stall", "inter_token")
        self.times = {name: Histogram() for name in names}

    def note(self, turn: Turn) -> None:
        """Adds a turn that has ended."""
        self.turns[str(turn.finish_reason)] += 1
        if turn.times.first_token_s is None:
            return
        self.prompt_tokens.update(asdict(turn.tokens_from))
        self.reply_tokens += len(turn.reply)
        self.decisions[turn.decision] += 1
        end_s, start_s = turn.times.finished_s, turn.times.submitted_s
        spans = {
            "ttft": turn.ttft_s,
            "queue": turn.queue_s,
            "latency": None if end_s is None else end_s - start_s,
            "exposed_stall": turn.exposed_stall_s,
            "inter_token": turn.tpot_s,
        }
        for name, seconds in spans.items():
            if seconds is not None:
                self.times[name].add(seconds)

    def describe(self) -> dict[str, object]:
        """The sums as plain values; times as their mean in seconds and their number."""
        return {
            "prompt_tokens": dict(self.prompt_tokens),
            "reply_tokens": self.reply_tokens,
            "turns": dict(self.turns),
            "decisions": dict(self.decisions),
            "times": {
                name: {
                    "num": sum(times.counts),
                    "mean_s": times.sum_s / max(1, sum(times.counts)),
                }
                for name, times in self.times.items()
            },
        }
