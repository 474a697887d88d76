"""What a user asks for: one turn of a session. Knows tokens and no engine."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import no_type_check

import numpy as np


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen from the logits.

    Attributes:
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_k: sample among the k most likely tokens; None among all.
        top_p: sample among the most likely tokens whose probabilities reach this sum.
        seed: of this request alone; the same request gives the same tokens whatever
            else is in the batch.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1, or None")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be at least 0 and below 2**32")


@no_type_check  # callers' mistakes are told in words of ours
@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One turn: new tokens in, a reply out.

    Attributes:
        session_id: the conversation it belongs to.
        token_ids: the tokens the user adds, kept as int32; the engine remembers the
            ones before.
        max_tokens: the reply ends after so many tokens at the latest.
        stop_token_ids: the reply ends with the first of these, which it includes.
        tenant: conversations of different tenants share nothing.
        is_whole_prompt: `token_ids` is the whole conversation so far and replaces what
            the engine remembers; what it has in common with that is still reused.
    """

    session_id: str
    token_ids: Sequence[int] | np.ndarray
    max_tokens: int = 128
    stop_token_ids: Sequence[int] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    tenant: str = "default"
    is_whole_prompt: bool = False

    def __post_init__(self) -> None:
        # Here and not when the turn is laid out: 8K numbers of Python take 0.2 ms.
        object.__setattr__(self, "token_ids", _int32(self.token_ids))
        object.__setattr__(self, "stop_token_ids", tuple(map(int, self.stop_token_ids)))
        if not len(self.token_ids):
            raise ValueError("the prompt is empty; a turn needs at least 1 token")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError if a token id is not in the vocabulary."""
        for token in (np.min(self.token_ids), np.max(self.token_ids)):
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"token id {token} is outside the vocabulary of {vocab_size} tokens"
                )


@no_type_check
def _int32(token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """An array that nobody else changes; ValueError if it is no row of token ids."""
    if not isinstance(token_ids, np.ndarray):
        token_ids = tuple(token_ids)
    try:
        given = np.asarray(token_ids)
    except ValueError:  # rows of different lengths
        raise ValueError("token_ids must be one row of whole numbers") from None
    if given.ndim != 1:
        raise ValueError(f"token_ids has {given.ndim} axes; a prompt has 1")
    if given.size and given.dtype.kind not in "iu":
        what = "larger ones" if given.dtype.kind == "O" else given.dtype
        raise ValueError(f"token ids must be whole numbers of 64 bits, not {what}")
    tokens = given.astype(np.int32)
    if not np.array_equal(tokens, given):
        outside = given[tokens != given][0]
        raise ValueError(f"token id {outside} is outside every vocabulary")
    tokens.setflags(write=False)
    return tokens
