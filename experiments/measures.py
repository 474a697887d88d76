"""Numbers of a replay: what `summary.json` says of one mode, and of two compared.

Knows finished turns. Does not know engines or how a figure is drawn.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cachedattn_jax.engine.turn import Turn
from experiments.replay import Replayed, TurnName

SOURCES = ("device", "host", "disk", "recomputed", "new")
# Two logits this close are a tie: float32 sums in another order may swap them.
TIE_MARGIN = 1e-4


def spread(values: Iterable[float | None]) -> dict[str, float | None]:
    """Mean and percentiles of the values that are there."""
    numbers = np.asarray([value for value in values if value is not None], float)
    if not len(numbers):
        return dict.fromkeys(("mean", "p50", "p95", "p99"))
    return {
        "mean": float(numbers.mean()),
        "p50": float(np.percentile(numbers, 50)),
        "p95": float(np.percentile(numbers, 95)),
        "p99": float(np.percentile(numbers, 99)),
    }


def gains(cached: Mapping, recompute: Mapping) -> dict[str, float]:
    """What the cache gains over computing again, from the summaries of both modes."""
    later = [m["prefill_s_later_turns"]["mean"] for m in (cached, recompute)]
    speed = [m["prompt_tokens"] / m["prefill_total_s"] for m in (cached, recompute)]
    return {
        "ttft_reduction_later_turns": 1 - later[0] / later[1],
        "prefill_speedup": speed[0] / speed[1],
    }


def mode_summary(replayed: Replayed) -> dict:
    """One mode of a run.

    `ttft_s` includes queueing and `prefill_s` does not. `hit_rate` is the share of
    prompt tokens that came from a tier; `history_hit_rate` is that of the tokens a
    session had computed before, which is all that a session-exclusive cache could hit.
    """
    turns = list(replayed.turns.values())
    later = [turn for (_, place), turn in replayed.turns.items() if place]
    tokens_from = {
        source: sum(getattr(turn.tokens_from, source) for turn in turns)
        for source in SOURCES
    }
    prompt_tokens = sum(len(turn.prompt) for turn in turns)
    cached = sum(turn.tokens_from.cached for turn in turns)
    history = cached + tokens_from["recomputed"]
    loaded_s = sum(turn.load_s for turn in turns)
    stalled_s = sum(turn.exposed_stall_s for turn in turns if turn.load_s)
    return {
        "num_sessions": len({turn.session for turn in turns}),
        "num_turns": len(turns),
        "prompt_tokens": prompt_tokens,
        "prefill_tokens_computed": tokens_from["recomputed"] + tokens_from["new"],
        "prefill_tokens_padded": sum(turn.num_chunk_tokens for turn in turns),
        "tokens_from": tokens_from,
        "hit_rate": cached / prompt_tokens,
        "history_hit_rate": cached / history if history else 0.0,
        "ttft_s": spread(turn.ttft_s for turn in turns),
        "ttft_s_later_turns": spread(turn.ttft_s for turn in later),
        "prefill_s": spread(turn.prefill_s for turn in turns),
        "prefill_s_later_turns": spread(turn.prefill_s for turn in later),
        "prefill_total_s": sum(turn.prefill_s or 0.0 for turn in turns),
        "load_s": spread(turn.load_s for turn in turns if turn.load_s),
        "exposed_stall_s": spread(t.exposed_stall_s for t in turns if t.load_s),
        "overlap_ratio": 1 - stalled_s / loaded_s if loaded_s else None,
        "decisions": dict(Counter(turn.decision for turn in turns)),
        "tpot_s": spread(turn.tpot_s for turn in turns),
        "output_tokens": sum(len(turn.reply) for turn in turns),
        "wall_s": replayed.wall_s,
    }


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A turn whose two replies differ."""

    session_id: str
    place: int
    token_index: int
    margin: float


@dataclass(frozen=True, kw_only=True)
class TokenComparison:
    """Replies of two modes to the same prompts, token by token.

    Attributes:
        ties: first differences where the two best logits lay within `TIE_MARGIN`; the
            rest of such a turn continues other tokens and is not compared.
        differences: first differences that were not ties.
    """

    num_turns: int
    num_tokens: int
    ties: Sequence[Difference] = field(default_factory=list)
    differences: Sequence[Difference] = field(default_factory=list)


def compare_tokens(
    ours: Mapping[TurnName, Turn], theirs: Mapping[TurnName, Turn]
) -> TokenComparison:
    """Compares every turn of two replays of one workload."""
    assert ours.keys() == theirs.keys()
    num_tokens, ties, differences = 0, [], []
    for (session_id, place), turn in ours.items():
        other = theirs[session_id, place]
        assert np.array_equal(turn.prompt, other.prompt), (session_id, place)
        pairs = list(zip(turn.reply, other.reply, strict=False))
        index = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        assert index is not None or len(turn.reply) == len(other.reply)
        num_tokens += len(pairs) if index is None else index + 1
        if index is None:
            continue
        margin = min(turn.margins[index], other.margins[index])
        difference = Difference(
            session_id=session_id, place=place, token_index=index, margin=margin
        )
        (ties if margin < TIE_MARGIN else differences).append(difference)
    return TokenComparison(
        num_turns=len(ours),
        num_tokens=num_tokens,
        ties=ties,
        differences=differences,
    )
