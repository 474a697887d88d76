"""What is dropped when a conversation reaches the window of its model.

Pure: knows lengths. Does not know what becomes of pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args, no_type_check

from cachedattn_jax.store.truncation import Context, Truncation

Policy = Literal[
    "truncate_pages", "truncate_tokens_recompute", "invalidate", "naive", "refuse"
]
_COMPUTES_ANEW = ("truncate_tokens_recompute", "invalidate")


@no_type_check  # gin passes what users write; checked here in words of ours
@dataclass(frozen=True, kw_only=True)
class TruncationConfig:
    """What happens when a conversation reaches the window. Paper, sections 3.4 and 4.3.

    Attributes:
        policy: "truncate_pages" drops whole pages and keeps the cache of the others.
            "truncate_tokens_recompute" drops tokens and computes the others anew, as
            engines do that cache absolute positions (TT in the paper). "invalidate"
            drops whole pages, and the stored pages of the conversation are lost (OF).
            "naive" keeps the cache and does not mend positions (NKVT): it ruins the
            model and is there to be measured. "refuse" ends the reply at the window and
            turns longer prompts away.
        ratio: share of the window that is dropped at once.
        keep_first_pages: pages at the beginning that always stay (attention sinks).
        max_replay_tokens: a page that was kept across a truncation and then lost is
            rebuilt exactly, by computing again what it was computed after, if that
            takes at most so many tokens. Otherwise what is left of the text is computed
            as if it were all, and the turn says that it is inexact. None: any number.
    """

    policy: Policy = "truncate_pages"
    ratio: float = 0.5
    keep_first_pages: int = 0
    max_replay_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.policy not in get_args(Policy):
            known = ", ".join(map(repr, get_args(Policy)))
            raise ValueError(f"policy={self.policy!r} is not one of {known}")
        is_number = isinstance(self.ratio, int | float)
        if not is_number or not 0 < self.ratio < 1:
            raise ValueError(f"ratio={self.ratio!r} must lie between 0 and 1")
        for name in ("keep_first_pages", "max_replay_tokens"):
            value = getattr(self, name)
            if name == "max_replay_tokens" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}={value!r} must be a whole number from 0 on")

    @property
    def loses_pages(self) -> bool:
        return self.policy == "invalidate"

    @property
    def computes_anew(self) -> bool:
        """Whether a truncation in the middle of a reply makes it wait for a prefill."""
        return self.policy in _COMPUTES_ANEW

    def check(self, window: int, page_tokens: int) -> None:
        """Raises ValueError unless a window has pages to drop and to keep."""
        least = (self.keep_first_pages + 2) * page_tokens
        if self.policy != "refuse" and window < least:
            raise ValueError(
                f"a window of {window} tokens has no page to drop: with"
                f" keep_first_pages={self.keep_first_pages} and pages of {page_tokens}"
                f" tokens it takes {least}"
            )


def pages_to_drop(window: int, page_tokens: int, ratio: float) -> int:
    """Pages of a window that a truncation drops: the ratio, rounded up."""
    return max(1, -(-int(ratio * window) // page_tokens))


def plan_truncations(
    config: TruncationConfig,
    window: int,
    page_tokens: int,
    truncations: Sequence[Truncation],
    context: Context,
    num_cached: int,
    num_tokens: int,
) -> tuple[Truncation, ...]:
    """The truncations, old and new, after which a prompt fits the window.

    A prompt that would fit after dropping what lies before it is computed after that.
    A longer one is computed in pieces, and what came first is dropped on the way.

    Args:
        truncations, context: of the history, and what they left.
        num_cached: tokens of the conversation that have keys and values.
        num_tokens: of the conversation, the new prompt included.
    """
    planned, at = tuple(truncations), num_cached
    while config.policy != "refuse" and context.position(num_tokens) > window:
        excess = context.position(num_tokens) - window
        fills_up = len(planned) > len(truncations)
        new = _next(config, window, page_tokens, context, at, excess, fills_up)
        at = new.at
        planned, context = (*planned, new), context.without(new.dropped)
    return planned


def truncate_full(
    config: TruncationConfig, window: int, page_tokens: int, context: Context, at: int
) -> Truncation:
    """What makes room for one more token when the window is full."""
    return _next(config, window, page_tokens, context, at, 1, fills_up=True)


def _next(
    config: TruncationConfig,
    window: int,
    page_tokens: int,
    context: Context,
    at: int,
    excess: int,
    fills_up: bool,
) -> Truncation:
    """What is dropped next.

    Args:
        fills_up: whether the window fills up before.
    """
    first, usual = config.keep_first_pages, int(config.ratio * window)
    start = first * page_tokens
    if config.policy == "truncate_tokens_recompute":
        stop = start + max(1, usual, excess)
        return Truncation(at=at, dropped=((start, stop),), method="recompute")
    usual_pages = pages_to_drop(window, page_tokens, config.ratio)
    least_pages = -(-excess // page_tokens)
    num_pages = max(usual_pages, least_pages)
    if config.policy == "invalidate":
        stop = start + num_pages * page_tokens
        return Truncation(at=at, dropped=((start, stop),), method="recompute")
    if fills_up or context.position(at) // page_tokens - first < least_pages:
        # Dropping all of a history that is too short would help for a moment only.
        at, num_pages = context.token(window - 1) + 1, usual_pages
    num_droppable = context.position(at) // page_tokens - first
    stop = start + min(num_pages, num_droppable) * page_tokens
    method = "naive" if config.policy == "naive" else "pages"
    return Truncation(at=at, dropped=((start, stop),), method=method)
