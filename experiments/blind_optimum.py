"""The best that can be done without seeing the future: a time to keep for each class.

Knows idle times and sizes. Does not know queues, tiers or policies.

Idle conversations are told apart by finished turns and by size. Each class is kept for
a fixed time after a turn and then given up. Of all such rules the one that hits most
often within a mean number of bytes is found by a price for memory: each class is kept
as long as its hits are worth their memory, and the price is where the memory is used
up. Times are fitted on one half of the sessions and used on the other, both ways.
Memory is held to its bound in the mean only, which a store with a fixed budget cannot
do, so the optimum is generous.
"""

from dataclasses import dataclass

import numpy as np

from cachedattn_jax.simulator.results import Results
from cachedattn_jax.simulator.trace import Trace

# Times to keep that are tried, in seconds.
_KEEPS_S = np.concatenate([[0.0], np.geomspace(1e-2, 1e6, 400)])


@dataclass(frozen=True, kw_only=True)
class IdleTimes:
    """What happened after each turn of a trace.

    Attributes:
        idle_s: until the next turn; infinite after a last turn.
        num_bytes: stored meanwhile.
        label: class of the conversation at that time.
        session: whose it is.
        span_s: length of the time in which they began.
        busy_bytes: held on average by turns that wait or run.
    """

    idle_s: np.ndarray
    num_bytes: np.ndarray
    label: np.ndarray
    session: np.ndarray
    span_s: float
    busy_bytes: float


def idle_times(
    trace: Trace,
    turns: Results,
    *,
    kv_bytes: int,
    window: int,
    truncation_ratio: float = 0.5,
    from_s: float,
    until_s: float,
    size_ratio: float = 2.0,
) -> IdleTimes:
    """Idle times as they were in a simulation of the trace.

    Args:
        turns: of the simulation.
        from_s, until_s: idle times that begin between these are taken.
    """
    rows = trace.first_row
    sessions = np.repeat(np.arange(trace.num_sessions), trace.turns_per_session)
    place = np.arange(trace.num_turns) - rows[:-1][sessions]
    sources = ("device", "host", "disk", "recomputed", "new", "output")
    num_tokens = sum(turns[name].astype(np.int64) for name in sources)
    dropped = int(truncation_ratio * window)
    over = np.maximum(0, num_tokens - window)
    num_tokens = num_tokens - -(-over // dropped) * dropped
    arrived_s, ended_s = turns["arrived_s"], turns["ended_s"]
    is_last = np.zeros(trace.num_turns, bool)
    is_last[rows[1:] - 1] = True
    idle = np.full(trace.num_turns, np.inf)
    idle[:-1] = np.where(is_last[:-1], np.inf, arrived_s[1:] - ended_s[:-1])
    many = np.minimum(np.ceil(np.log2(place + 1)).astype(int), 5)
    sizes = (np.log(num_tokens) / np.log(size_ratio)).astype(int)
    num_bytes = num_tokens * float(kv_bytes)
    chosen = (ended_s >= from_s) & (ended_s < until_s)
    # While a turn waits or runs the store holds what it found, and no more.
    found = sum(turns[name].astype(np.int64) for name in sources[:3])
    busy_byte_s = ((ended_s - arrived_s) * found * float(kv_bytes))[chosen].sum()
    return IdleTimes(
        idle_s=np.maximum(0.0, idle)[chosen],
        num_bytes=num_bytes[chosen],
        label=(many * 1000 + sizes)[chosen],
        session=sessions[chosen],
        span_s=until_s - from_s,
        busy_bytes=float(busy_byte_s / (until_s - from_s)),
    )


def blind_optimum(idle: IdleTimes, capacity: float) -> float:
    """Share of returning turns that hit, cross-validated over two halves of sessions.

    Args:
        capacity: bytes of all tiers below the device together.
    """
    halves = idle.session % 2
    capacity = max(0.0, capacity - idle.busy_bytes)
    hits = returns = 0.0
    for half in (0, 1):
        keeps = _fit(idle, halves != half, capacity / 2)
        chosen = halves == half
        label, waited = idle.label[chosen], idle.idle_s[chosen]
        keep_s = np.array([keeps.get(number, 0.0) for number in label.tolist()])
        hits += float((waited <= keep_s).sum())
        returns += float(np.isfinite(waited).sum())
    return hits / max(1.0, returns)


def _fit(idle: IdleTimes, chosen: np.ndarray, capacity: float) -> dict[int, float]:
    """Times to keep by class that use up `capacity` bytes in the mean."""
    curves = {}
    for label in np.unique(idle.label[chosen]).tolist():
        of = chosen & (idle.label == label)
        waited, size = np.sort(idle.idle_s[of]), float(idle.num_bytes[of].mean())
        finite = np.where(np.isfinite(waited), waited, 0.0)
        count = np.searchsorted(waited, _KEEPS_S, side="right")
        held = np.concatenate([[0.0], np.cumsum(finite)])[count]
        rest = _KEEPS_S * (len(waited) - count)
        curves[label] = (count, size * (held + rest))
    budget = capacity * idle.span_s
    low, high = 1e-30, 1.0
    for _ in range(100):
        price = (low * high) ** 0.5
        used = sum(
            byte_s[np.argmax(count - price * byte_s)]
            for count, byte_s in curves.values()
        )
        low, high = (price, high) if used > budget else (low, price)
    return {
        label: float(_KEEPS_S[np.argmax(count - high * byte_s)])
        for label, (count, byte_s) in curves.items()
    }
