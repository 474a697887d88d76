"""What is asked of an engine: conversations, their turns and when they come.

Knows lengths, times and how to make up prompts. Does not know where a workload comes
from, nor engines.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message of the user and the reply to it.

    Attributes:
        think_s: how long the user waits before sending, 0 for the first turn of a
            conversation; `Workload.is_open_loop` says since when.
        token_ids: the message itself, where its text is known.
    """

    new_tokens: int
    output_tokens: int
    think_s: float = 0.0
    token_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("new_tokens", "output_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.think_s < math.inf:
            raise ValueError(f"think_s={self.think_s} must be a time from 0 on")
        if self.token_ids is not None and len(self.token_ids) != self.new_tokens:
            raise ValueError(
                f"token_ids holds {len(self.token_ids)} tokens,"
                f" new_tokens={self.new_tokens}"
            )

    @property
    def num_tokens(self) -> int:
        """What this turn adds to the context."""
        return self.new_tokens + self.output_tokens


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """The turns of one session, in order.

    Attributes:
        first_turn: place of `turns[0]` in the conversation that people had. Above 1
            only a middle piece is known, and it is served as if nothing came before.
    """

    session_id: str
    arrival_s: float
    turns: tuple[Turn, ...]
    first_turn: int = 1

    def __post_init__(self) -> None:
        if not self.turns:
            raise ValueError(f"conversation {self.session_id!r} has no turns")
        if not 0 <= self.arrival_s < math.inf:
            raise ValueError(
                f"conversation {self.session_id!r}: arrival_s={self.arrival_s}"
                " must be a time from 0 on"
            )
        if self.turns[0].think_s:
            raise ValueError(
                f"conversation {self.session_id!r}: the first turn comes at arrival_s,"
                f" so its think_s={self.turns[0].think_s} must be 0"
            )
        if self.first_turn < 1:
            raise ValueError(
                f"conversation {self.session_id!r}: first_turn={self.first_turn}"
                " must be at least 1"
            )

    @property
    def starts_at_turn_1(self) -> bool:
        return self.first_turn == 1

    @property
    def num_tokens(self) -> int:
        """Context after the last turn."""
        return sum(turn.num_tokens for turn in self.turns)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Conversations in order of arrival.

    Attributes:
        scale: factor that the lengths were multiplied by since they were read.
        is_open_loop: think times run from the arrival of the turn before, as a trace
            recorded them; otherwise from the end of its reply.
        counts: what was changed or left out on the way here, by name.
    """

    name: str
    conversations: tuple[Conversation, ...]
    scale: float = 1.0
    is_open_loop: bool = False
    counts: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.conversations:
            raise ValueError(f"workload {self.name!r} has no conversations")
        last_s = 0.0
        names = set()
        for conversation in self.conversations:
            if conversation.session_id in names:
                raise ValueError(
                    f"workload {self.name!r} has two conversations with"
                    f" session_id={conversation.session_id!r}"
                )
            if conversation.arrival_s < last_s:
                raise ValueError(
                    f"conversation {conversation.session_id!r} with"
                    f" arrival_s={conversation.arrival_s} stands after one that"
                    f" arrives at {last_s}; order conversations by arrival"
                )
            names.add(conversation.session_id)
            last_s = conversation.arrival_s

    @property
    def num_sessions(self) -> int:
        return len(self.conversations)

    @property
    def num_turns(self) -> int:
        return sum(len(conversation.turns) for conversation in self.conversations)

    def describe(self) -> dict[str, str | int | float]:
        """Its size in numbers, for people and for the summary of a run."""
        turns = np.array([len(c.turns) for c in self.conversations])
        tokens = np.array([c.num_tokens for c in self.conversations])
        new_tokens = sum(t.new_tokens for c in self.conversations for t in c.turns)
        prompts = new_tokens + self._num_history_tokens()
        return {
            "name": self.name,
            "scale": self.scale,
            "num_sessions": self.num_sessions,
            "num_turns": self.num_turns,
            "mean_turns": float(turns.mean()),
            "multi_turn_share": float((turns > 1).mean()),
            "new_tokens": new_tokens,
            "output_tokens": int(tokens.sum()) - new_tokens,
            "mean_session_tokens": float(tokens.mean()),
            "longest_session_tokens": int(tokens.max()),
            # What recomputation would prefill again.
            "history_share": 1 - new_tokens / prompts,
            "last_arrival_s": self.conversations[-1].arrival_s,
            **self.counts,
        }

    def first(self, num_sessions: int) -> "Workload":
        """The conversations that arrive first."""
        if not 1 <= num_sessions <= self.num_sessions:
            raise ValueError(
                f"num_sessions={num_sessions} must be from 1 to the"
                f" {self.num_sessions} sessions of {self.name!r}"
            )
        return replace(self, conversations=self.conversations[:num_sessions])

    def scaled(self, factor: float, max_tokens: int) -> "Workload":
        """The same conversations with messages `factor` times as long.

        A message keeps at least one token. A turn that would take its conversation past
        `max_tokens` of context goes whole, and all turns after it; a conversation that
        has no turn left goes too. `counts` says how many.
        """
        if not 0 < factor < math.inf:
            raise ValueError(f"{factor=} must be a positive number")
        kept: list[Conversation] = []
        for conversation in self.conversations:
            turns = _fitting(conversation, factor, max_tokens)
            if turns:
                kept.append(replace(conversation, turns=turns))
        if not kept:
            raise ValueError(
                f"no first turn of {self.name!r} fits {max_tokens=} at {factor=}"
            )
        counts = Counter(self.counts)
        num_turns = sum(len(conversation.turns) for conversation in kept)
        counts["turns_past_max_tokens"] += self.num_turns - num_turns
        counts["sessions_past_max_tokens"] += self.num_sessions - len(kept)
        return replace(
            self,
            conversations=tuple(kept),
            scale=self.scale * factor,
            counts=dict(counts),
        )

    @staticmethod
    def prompt(
        conversation: Conversation, turn_index: int, vocab_size: int, seed: int
    ) -> np.ndarray:
        """The user's message as int32 token ids [new_tokens].

        Without `token_ids` it is made up: uniform over the vocabulary but for id 0, and
        a function of the seed, the session id and the place of the turn only.
        """
        turn = conversation.turns[turn_index]
        if turn.token_ids is not None:
            least, most = min(turn.token_ids), max(turn.token_ids)
            if not 0 <= least <= most < vocab_size:
                raise ValueError(
                    f"conversation {conversation.session_id!r}, {turn_index=}: token"
                    f" ids from {least} to {most} do not fit {vocab_size=}"
                )
            return np.array(turn.token_ids, np.int32)
        if vocab_size < 2:
            raise ValueError(f"{vocab_size=} must be at least 2")
        name = hashlib.blake2b(conversation.session_id.encode(), digest_size=8)
        entropy = (seed, int.from_bytes(name.digest()), turn_index)
        rng = np.random.default_rng(entropy)
        return rng.integers(1, vocab_size, turn.new_tokens, np.int32)

    def _num_history_tokens(self) -> int:
        total = 0
        for conversation in self.conversations:
            context = 0
            for turn in conversation.turns:
                total += context
                context += turn.num_tokens
        return total


def _fitting(
    conversation: Conversation, factor: float, max_tokens: int
) -> tuple[Turn, ...]:
    turns: list[Turn] = []
    context = 0
    for turn in conversation.turns:
        turn = _scaled_turn(conversation.session_id, turn, factor)
        context += turn.num_tokens
        if context > max_tokens:
            break
        turns.append(turn)
    return tuple(turns)


def _scaled_turn(session_id: str, turn: Turn, factor: float) -> Turn:
    new_tokens = max(1, round(turn.new_tokens * factor))
    token_ids = turn.token_ids
    if token_ids is not None:
        if new_tokens > len(token_ids):
            raise ValueError(
                f"conversation {session_id!r} has token ids, which {factor=} cannot"
                " make longer"
            )
        token_ids = token_ids[:new_tokens]
    return replace(
        turn,
        new_tokens=new_tokens,
        output_tokens=max(1, round(turn.output_tokens * factor)),
        token_ids=token_ids,
    )
