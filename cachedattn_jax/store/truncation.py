"""What a conversation lost from its front, and which of its tokens a model still sees.

Pure: knows tokens by their number. Does not know pages, keys or why something was lost.

    conversation  0 1 2 3 4 5 6 7 8 9 ...        a token's place in all that was said
    gaps              [2 . . . 6)                 what truncations took out
    context       0 1         6 7 8 9             what the model sees, at positions
    positions     0 1         2 3 4 5
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Span = tuple[int, int]  # [start, stop)
Method = Literal["pages", "repack", "naive", "recompute", "lost"]

# What is left of the cache counts for nothing: it is computed anew from the text.
_COMPUTED_ANEW = ("recompute", "lost")
# Keys of what is left are rotated and written to other places.
_REWRITES = ("repack", "naive")


@dataclass(frozen=True, kw_only=True)
class Truncation:
    """Tokens that left the context of a conversation. Paper, section 3.4.

    Attributes:
        at: tokens of the conversation that had keys and values when it happened.
        dropped: positions of the context that left it.
        method: "pages": whole pages were dropped, the others stay as they are.
            "repack": single tokens were dropped, what is behind them moved up. "naive":
            whole pages were dropped and the keys of the others keep positions that are
            not theirs any more. "recompute": what is left was computed anew. "lost": so
            too, because pages were lost that could not be rebuilt: not what the
            conversation would have been.
    """

    at: int
    dropped: tuple[Span, ...]
    method: Method = "pages"

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"method={self.method!r} is none of {get_args(Method)}")
        spans = tuple((int(start), int(stop)) for start, stop in self.dropped)
        object.__setattr__(self, "dropped", spans)

    @property
    def is_computed_anew(self) -> bool:
        return self.method in _COMPUTED_ANEW

    @property
    def rewrites_pages(self) -> bool:
        return self.method in _REWRITES

    @property
    def num_dropped(self) -> int:
        return sum(stop - start for start, stop in self.dropped)

    def name(self, page_tokens: int, offset: int) -> str:
        """The event as it goes into the key of the page after it.

        Args:
            offset: tokens of that page that were there before.
        """
        spans = ",".join(f"{start}-{stop}" for start, stop in self.dropped)
        if self.method == "pages":
            ((start, stop),) = self.dropped
            spans = f"{(stop - start) // page_tokens}"
            spans += f" after {start // page_tokens}" if start else ""
        kind = "truncated" if self.method == "pages" else self.method
        return f"{kind}({spans})" + (f" at {offset}" if offset else "")


@dataclass(frozen=True)
class Context:
    """The tokens of a conversation that a model sees, numbered from 0 as positions.

    Attributes:
        gaps: of the conversation, in order and apart from each other.
    """

    gaps: tuple[Span, ...] = ()

    def position(self, token: int) -> int:
        """How many tokens of the context come before one of the conversation."""
        return token - sum(
            max(0, min(stop, token) - start) for start, stop in self.gaps
        )

    def token(self, position: int) -> int:
        """The place in the conversation of the token at a position."""
        for start, stop in self.gaps:
            if position < start:
                break
            position += stop - start
        return position

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """int64, places in the conversation of the positions start..stop-1."""
        tokens = np.arange(start, stop)
        for gap_start, gap_stop in self.gaps:
            tokens[tokens >= gap_start] += gap_stop - gap_start
        return tokens

    def of(self, token_ids: np.ndarray, start: int, stop: int) -> np.ndarray:
        """The tokens of a conversation at the positions start..stop-1.

        A view where nothing was dropped.
        """
        if not self.gaps:
            return token_ids[start:stop]
        return token_ids[self.tokens(start, stop)]

    def without(self, dropped: tuple[Span, ...]) -> "Context":
        """The context after positions were dropped from it."""
        spans = [(self.token(a), self.token(b - 1) + 1) for a, b in dropped if b > a]
        gaps: list[Span] = []
        for start, stop in sorted([*self.gaps, *spans]):
            if gaps and start <= gaps[-1][1]:
                start, stop = gaps[-1][0], max(stop, gaps[-1][1])
                gaps.pop()
            gaps.append((start, stop))
        return Context(tuple(gaps))


def context_after(truncations: tuple[Truncation, ...]) -> Context:
    """What is left of a conversation after these truncations."""
    context = Context()
    for truncation in truncations:
        context = context.without(truncation.dropped)
    return context


def truncations_before(
    num_tokens: int, truncations: tuple[Truncation, ...]
) -> tuple[Truncation, ...]:
    """Those after which one of the first tokens was computed; others are undone."""
    return tuple(item for item in truncations if item.at < num_tokens)
