"""What a turn means for the store: its whole prompt, and the pages that could serve it.

Pure: knows tokens and page keys, no arrays on a device and no tier.
"""

from dataclasses import dataclass

import numpy as np

from cachedattn_jax.engine.request import Request
from cachedattn_jax.engine.turn import TokensFrom
from cachedattn_jax.store.catalog import SessionRecord
from cachedattn_jax.store.layout import Layout
from cachedattn_jax.store.lease import Lease
from cachedattn_jax.store.page import PageKey, Tail, chain_keys, next_key


@dataclass(frozen=True, kw_only=True)
class TurnPlan:
    """A turn before it holds anything.

    Attributes:
        prompt: int32, history and new tokens.
        num_history: tokens of the prompt whose keys and values the session has
            computed.
        keys: of all full pages of the prompt.
        reusable_keys: those that may be loaded; at least one token must be computed, or
            there would be no logits.
        tail: the session's partly filled last page.
        max_tokens: reply tokens at most, the window considered.
    """

    salt: bytes
    prompt: np.ndarray
    num_history: int
    keys: list[PageKey]
    reusable_keys: list[PageKey]
    tail: Tail | None
    max_tokens: int

    def tokens_from(self, lease: Lease) -> TokensFrom:
        """Accounts for every token of the prompt."""
        num_computed = len(self.prompt) - lease.cached_tokens
        num_recomputed = max(0, self.num_history - lease.cached_tokens)
        return TokensFrom(
            **{tier.value: tokens for tier, tokens in lease.tokens_from.items()},
            recomputed=num_recomputed,
            new=num_computed - num_recomputed,
        )

    def final_pages(
        self, layout: Layout, token_ids: np.ndarray, known: list[PageKey]
    ) -> tuple[list[PageKey], Tail | None]:
        """Keys of the full pages, and the tail, of the conversation after the reply.

        Args:
            known: keys of its first pages.

        The last token was sampled but never fed back: it has no keys and values yet.
        """
        cached = token_ids[:-1]
        keys = chain_keys(layout, self.salt, cached, known)
        return keys, _tail(layout, self.salt, keys, cached)


def check_window(window: int, request: Request, record: SessionRecord | None) -> None:
    """Raises ValueError unless the prompt leaves room for a reply in the window."""
    num_tokens = len(request.token_ids)
    if record is not None and not request.is_whole_prompt:
        num_tokens += len(record.token_ids)
    if num_tokens >= window:
        raise ValueError(
            f"the prompt of session {request.session_id!r} has {num_tokens} tokens with"
            f" its history; the window of {window} takes at most {window - 1}"
        )


def plan_turn(
    layout: Layout,
    window: int,
    request: Request,
    record: SessionRecord | None,
    salt: bytes,
) -> TurnPlan:
    """Lays out a turn; ValueError if its prompt does not fit the window."""
    check_window(window, request, record)
    new = np.asarray(request.token_ids, np.int32)
    known = np.zeros(0, np.int32) if record is None else record.token_ids
    prompt = new if request.is_whole_prompt else np.concatenate([known, new])
    num_cached = 0 if record is None else record.cached_length
    num_history = min(_common_length(known, prompt), num_cached, len(prompt) - 1)

    step = layout.page_tokens
    known_keys = [] if record is None else list(record.page_keys)
    keys = chain_keys(layout, salt, prompt, known_keys[: num_history // step])
    tail = None
    if num_history == num_cached:
        tail = _tail(layout, salt, keys[: num_history // step], prompt[:num_history])
    return TurnPlan(
        salt=salt,
        prompt=prompt,
        num_history=num_history,
        keys=keys,
        reusable_keys=keys[: (len(prompt) - 1) // step],
        tail=tail,
        max_tokens=min(request.max_tokens, window - len(prompt)),
    )


def _tail(
    layout: Layout, salt: bytes, keys: list[PageKey], cached: np.ndarray
) -> Tail | None:
    token_ids = cached[len(keys) * layout.page_tokens :]
    if not len(token_ids):
        return None
    key = next_key(layout, salt, keys, token_ids)
    return Tail(index=len(keys), key=key, token_ids=token_ids)


def _common_length(first: np.ndarray, second: np.ndarray) -> int:
    length = min(len(first), len(second))
    differs = np.nonzero(first[:length] != second[:length])[0]
    return int(differs[0]) if len(differs) else length
