"""Trials on small engines: prompts of noise, repeated and interleaved, with intervals.

Knows how to serve and to repeat. Does not know what a trial is about.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.progress import Progress

from cachedattn_jax.engine.engine import Engine
from cachedattn_jax.engine.request import Request
from cachedattn_jax.engine.turn import Turn
from cachedattn_jax.store.placement.tier import Tier
from experiments.deadline import Deadline


def noise(rng: np.random.Generator, num_tokens: int, vocab_size: int) -> list[int]:
    """A prompt that no other shares a page with."""
    return rng.integers(1, vocab_size, num_tokens).tolist()


def submit(
    engine: Engine, session_id: str, prompt: Sequence[int], max_tokens: int = 1
) -> Turn:
    """Queues a turn whose whole conversation is `prompt`."""
    return engine.submit(
        Request(
            session_id=session_id,
            token_ids=prompt,
            max_tokens=max_tokens,
            is_whole_prompt=True,
        )
    )


def serve(engine: Engine) -> None:
    """Serves until nothing waits or runs; raises what went wrong with a turn."""
    turns = engine.scheduler.running + engine.scheduler.waiting
    engine.run_until_idle()
    for turn in turns:
        if turn.error is not None:
            raise turn.error


def to_tier(engine: Engine, tier: Tier) -> None:
    """Makes `tier` the fastest one that holds what was said so far."""
    engine.store.saver.drain()
    for above in list(Tier)[: list(Tier).index(tier)]:
        engine.store.empty(above)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean, and where it lies with 95 % confidence (Student's t)."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


# Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom; 1.96 and a bit beyond.
_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16)


def interval(values: Sequence[float]) -> Interval:
    """Of at least two independent values."""
    count = len(values)
    t = _T95[count - 2] if count - 2 < len(_T95) else 2.1
    half = t * float(np.std(values, ddof=1)) / count**0.5
    mean = float(np.mean(values))
    return Interval(mean=mean, low=mean - half, high=mean + half)


def repeat(
    trials: Mapping[str, Callable[[], float]],
    repeats: int,
    what: str,
    deadline: Deadline | None = None,
) -> dict[str, list[float]]:
    """Runs every trial once, then all of them again, so that drift hits all alike.

    The first round is thrown away. Every second round goes backwards. Rounds after the
    second are left out where the time is over.
    """
    deadline = deadline or Deadline()
    results: dict[str, list[float]] = {name: [] for name in trials}
    with Progress(console=Console()) as progress:
        task = progress.add_task(what, total=(repeats + 1) * len(trials))
        longest_s = 0.0
        for number in range(repeats + 1):
            if number > 1 and deadline.left_s < longest_s:
                deadline.left_out.append(f"round {number} of {what}")
                continue
            started = time.monotonic()
            names = list(trials) if number % 2 else list(trials)[::-1]
            for name in names:
                value = trials[name]()
                if number:
                    results[name].append(value)
                progress.advance(task)
            longest_s = max(longest_s, time.monotonic() - started)
    return results
