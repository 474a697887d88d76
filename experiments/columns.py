"""Workloads as columns of numbers, which simulations play.

Knows both forms. Does not know systems.
"""

from dataclasses import replace

import numpy as np

from cachedattn_jax.simulator.trace import Trace
from experiments.generator import GeneratorConfig, draw
from experiments.workload import Workload


def as_trace(workload: Workload) -> Trace:
    """The columns of a workload."""
    turns = [turn for c in workload.conversations for turn in c.turns]
    num_turns = [len(c.turns) for c in workload.conversations]
    return Trace(
        name=workload.name,
        arrival_s=np.array([c.arrival_s for c in workload.conversations]),
        first_row=np.concatenate([[0], np.cumsum(num_turns)]),
        new_tokens=np.array([turn.new_tokens for turn in turns]),
        output_tokens=np.array([turn.output_tokens for turn in turns]),
        think_s=np.array([turn.think_s for turn in turns], float),
        is_open_loop=workload.is_open_loop,
    )


def generate_trace(
    config: GeneratorConfig,
    *,
    sessions_per_s: float | None = None,
    think_s: float | None = None,
) -> Trace:
    """What `generate` draws, at a tenth of the time and memory.

    Args:
        sessions_per_s: arrivals, if not those of `config.arrivals`.
        think_s: of every later turn, if not those.
    """
    num_turns, users, replies, times_rng = draw(config)
    rate = config.arrivals.sessions_per_s if sessions_per_s is None else sessions_per_s
    arrivals = replace(config.arrivals, sessions_per_s=rate)
    arrival_s, think = arrivals.times(num_turns, times_rng)
    first_row = np.concatenate([[0], np.cumsum(num_turns)])
    if think_s is not None:
        think = np.full(len(users), float(think_s))
    think[first_row[:-1]] = 0.0
    return Trace(
        name="sharegpt-generated",
        arrival_s=arrival_s,
        first_row=first_row,
        new_tokens=users,
        output_tokens=replies,
        think_s=think,
    )
