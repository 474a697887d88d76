"""What a turn means for the store: its whole prompt, and the pages that could serve it.

Pure: knows tokens, truncations and page keys, no arrays on a device and no tier.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from cachedattn_jax.engine.request import Request
from cachedattn_jax.engine.truncation import TruncationConfig, plan_truncations
from cachedattn_jax.engine.turn import TokensFrom
from cachedattn_jax.store.catalog import SessionRecord
from cachedattn_jax.store.chain import Chain
from cachedattn_jax.store.layout import Layout
from cachedattn_jax.store.lease import Lease
from cachedattn_jax.store.page import PageKey, Tail
from cachedattn_jax.store.truncation import (
    Context,
    Truncation,
    context_after,
    truncations_before,
)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Tokens of a prompt to compute one after the other.

    Attributes:
        start: position of the first of them.
        truncation: happens before they are computed.
    """

    token_ids: np.ndarray
    start: int
    truncation: Truncation | None


@dataclass(frozen=True, kw_only=True)
class TurnPlan:
    """A turn before it holds anything.

    Attributes:
        prompt: int32, the conversation, history and new tokens, whatever was dropped.
        num_history: tokens of the prompt whose keys and values the session has
            computed.
        num_known: truncations that had happened by then.
        truncations: all that have happened when the prompt is computed.
        whole: the pages there are then.
        stored: the pages that computing could start from. At least one token must be
            computed, or there would be no logits.
        tail: a partly filled page behind the first pages of `stored`.
        at_tail: the pages when the tail was what it is.
        max_tokens: reply tokens at most, the window considered.
    """

    prompt: np.ndarray
    num_history: int
    num_known: int
    truncations: tuple[Truncation, ...]
    whole: Chain
    stored: Chain
    tail: Tail | None
    at_tail: Chain
    max_tokens: int

    @property
    def context_tokens(self) -> int:
        """Tokens the model sees, those to be dropped meanwhile included."""
        return self.stored.context.position(len(self.prompt))

    @property
    def stored_tokens(self) -> np.ndarray:
        """int32, the tokens of the pages of `stored`."""
        num_tokens = len(self.stored.pages) * self.stored.layout.page_tokens
        return self.stored.context.of(self.prompt, 0, num_tokens)

    @property
    def truncates_meanwhile(self) -> bool:
        """Whether something is dropped while the prompt is computed."""
        return self.stored.num_truncations < len(self.truncations)

    @property
    def num_replayed(self) -> int:
        """Tokens computed again since a page behind a truncation is not stored."""
        if self.stored.num_truncations >= self.num_known:
            return 0
        before = self.stored.context.position(self.num_history)
        return max(0, before - self.stored.position)

    def from_tail(self) -> "TurnPlan":
        """The plan that starts from the tail."""
        return replace(self, stored=self.at_tail)

    def before(self, index: int) -> "TurnPlan":
        """The plan that starts when a page of `stored` was begun.

        It needs the pages of that time: the first `index` of `stored`, unless something
        was dropped since.
        """
        stored = self.stored.before(index, self.prompt, self.truncations)
        tail = stored.tail(self.prompt)
        return replace(self, stored=stored, tail=tail, at_tail=stored)

    def needs_no_more(self, keys: list[PageKey]) -> bool:
        """Whether these pages are all that the plan starts from."""
        return self.tail is None and self.stored.keys == keys

    def pieces(self, cached_tokens: int) -> Iterator[Piece]:
        """What is to be computed when the start of the context has keys and values."""
        context, position = self.stored.context, cached_tokens
        last: Truncation | None = None
        for truncation in self.truncations[self.stored.num_truncations :]:
            stop = context.position(truncation.at)
            yield self._piece(context, position, stop, last)
            last, context = truncation, context.without(truncation.dropped)
            position = context.position(truncation.at)
        yield self._piece(context, position, context.position(len(self.prompt)), last)

    def _piece(
        self, context: Context, start: int, stop: int, truncation: Truncation | None
    ) -> Piece:
        token_ids = context.of(self.prompt, start, stop)
        return Piece(token_ids=token_ids, start=start, truncation=truncation)

    def tokens_from(self, lease: Lease) -> TokensFrom:
        """Accounts for every token of the prompt."""
        context, cached = self.stored.context, lease.cached_tokens
        num_computed = context.position(len(self.prompt)) - cached
        num_recomputed = max(0, context.position(self.num_history) - cached)
        return TokensFrom(
            **{tier.value: tokens for tier, tokens in lease.tokens_from.items()},
            recomputed=num_recomputed,
            new=num_computed - num_recomputed,
            dropped=len(self.prompt) - num_computed - cached,
        )


def check_window(
    config: TruncationConfig,
    window: int,
    request: Request,
    record: SessionRecord | None,
) -> None:
    """Raises ValueError where a prompt is refused: it leaves no room for a reply."""
    if config.policy != "refuse":
        return
    num_tokens = len(request.token_ids)
    if record is not None and not request.is_whole_prompt:
        num_tokens += context_after(record.truncations).position(len(record.token_ids))
    if num_tokens >= window:
        raise ValueError(
            f"the prompt of session {request.session_id!r} has {num_tokens} tokens with"
            f" its history; the window of {window} takes at most {window - 1}"
        )


def plan_turn(
    layout: Layout,
    config: TruncationConfig,
    window: int,
    request: Request,
    record: SessionRecord | None,
    salt: bytes,
) -> TurnPlan:
    """Lays out a turn; ValueError if its prompt is refused."""
    check_window(config, window, request, record)
    new = np.asarray(request.token_ids, np.int32)  # no copy: it is so already
    known = np.zeros(0, np.int32) if record is None else record.token_ids
    prompt = new if request.is_whole_prompt else np.concatenate([known, new])
    num_cached = 0 if record is None else record.cached_length
    num_history = min(_common_length(known, prompt), num_cached, len(prompt) - 1)

    history = Chain(layout=layout, salt=salt)
    truncations: tuple[Truncation, ...] = ()
    if record is not None:
        truncations = record.truncations
        if num_history < num_cached:
            truncations = truncations_before(num_history, truncations)
        # Its keys are not hashed again: 8K tokens took half a millisecond.
        history = _beginning(record.chain or history, num_history, num_cached, prompt)
    history = history.after(prompt, truncations, num_history)
    max_tokens = request.max_tokens
    if config.policy == "refuse":
        room = window - history.context.position(len(prompt))
        max_tokens = min(max_tokens, room)
    has_tail = num_history == num_cached
    return plan_prompt(
        config, window, history, prompt, truncations, num_history, max_tokens, has_tail
    )


def plan_prompt(
    config: TruncationConfig,
    window: int,
    history: Chain,
    prompt: np.ndarray,
    truncations: tuple[Truncation, ...],
    num_history: int,
    max_tokens: int,
    has_tail: bool,
) -> TurnPlan:
    """Lays out what follows a history.

    Args:
        history: the pages of the first `num_history` tokens.
        truncations: those that happened in it.
        has_tail: whether the last page, partly filled, may be stored.
    """
    step, num_known = history.layout.page_tokens, len(truncations)
    planned = plan_truncations(
        config, window, step, truncations, history.context, num_history, len(prompt)
    )
    stored = history.after(prompt, planned, len(prompt) - 1)
    tail, at_tail = history.tail(prompt) if has_tail else None, history
    if tail is not None and len(planned) > num_known:
        # The tail itself is as it was, behind fewer pages.
        moves = all(
            item.at == num_history and item.method == "pages"
            for item in planned[num_known:]
        )
        at_tail = history.after(prompt, planned, num_history)
        tail = replace(tail, index=len(at_tail.pages)) if moves else None
    return TurnPlan(
        prompt=prompt,
        num_history=num_history,
        num_known=num_known,
        truncations=planned,
        whole=stored.after(prompt, planned, len(prompt)),
        stored=stored,
        tail=tail,
        at_tail=at_tail,
        max_tokens=max_tokens,
    )


def plan_inexact(config: TruncationConfig, window: int, plan: TurnPlan) -> TurnPlan:
    """The plan that takes what is left of the text as if it were all that was said."""
    known = plan.truncations[: plan.num_known]
    lost = Truncation(at=plan.num_history, dropped=(), method="lost")
    known += (lost,)
    return plan_next(config, window, plan, plan.prompt, known, plan.num_history)


def plan_next(
    config: TruncationConfig,
    window: int,
    plan: TurnPlan,
    prompt: np.ndarray,
    truncations: tuple[Truncation, ...],
    num_history: int,
) -> TurnPlan:
    """The plan of the same turn after another truncation."""
    empty = Chain(layout=plan.whole.layout, salt=plan.whole.salt)
    history = empty.after(prompt, truncations, num_history)
    return plan_prompt(
        config,
        window,
        history,
        prompt,
        truncations,
        num_history,
        plan.max_tokens,
        has_tail=False,
    )


def _beginning(
    chain: Chain, num_tokens: int, num_cached: int, prompt: np.ndarray
) -> Chain:
    """What is left of a session's chain if the prompt has only its first tokens.

    Args:
        num_tokens: that they have in common, of `num_cached`.
    """
    if num_tokens == num_cached:
        return chain
    if chain.num_truncations:
        return Chain(layout=chain.layout, salt=chain.salt)
    full = min(num_tokens // chain.layout.page_tokens, len(chain.pages))
    return chain.before(full, prompt, ())


def _common_length(first: np.ndarray, second: np.ndarray) -> int:
    length = min(len(first), len(second))
    if np.array_equal(first[:length], second[:length]):
        return length
    return int(np.argmax(first[:length] != second[:length]))
