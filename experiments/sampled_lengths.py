"""Real message lengths: 1,000 pieces of ShareGPT conversations, as shipped.

Knows token counts; there is no text. Does not know the tokenizer that counted.
"""

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from experiments.arrivals import Arrivals
from experiments.sharegpt import Role, pair_turns
from experiments.workload import Conversation, Turn, Workload

_PATH = Path(__file__).parent / "traces" / "sharegpt_lengths.csv.gz"
_ROLES: tuple[Role, ...] = ("system", "user", "assistant")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Which of the sampled sessions are played, and when.

    Attributes:
        min_turns: shorter sessions are passed over.
        from_turn_1: take sessions that begin where their conversation began only; the
            others are later pieces of one. Where a session ends, its conversation may
            have gone on.
    """

    num_sessions: int = 24
    seed: int = 0
    arrivals: Arrivals = Arrivals()
    min_turns: int = 1
    from_turn_1: bool = False

    def __post_init__(self) -> None:
        for name in ("num_sessions", "min_turns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class MessageLengths:
    """Tokens of all sampled messages of a kind, in no order that means anything."""

    first_user: np.ndarray
    later_user: np.ndarray
    assistant: np.ndarray


def sample(config: SampleConfig) -> Workload:
    """Draws sessions of real lengths, none of them twice; more begin with fewer."""
    sessions = [
        session
        for session in sampled_sessions()
        if len(session.turns) >= config.min_turns
        and (session.starts_at_turn_1 or not config.from_turn_1)
    ]
    if config.num_sessions > len(sessions):
        raise ValueError(
            f"num_sessions={config.num_sessions} exceeds the {len(sessions)} sampled"
            f" sessions with min_turns={config.min_turns} and"
            f" from_turn_1={config.from_turn_1}"
        )
    draw_rng, times_rng = np.random.default_rng(config.seed).spawn(2)
    drawn = draw_rng.permutation(len(sessions))[: config.num_sessions]
    return Workload(
        name="sharegpt-sample",
        conversations=config.arrivals.schedule(
            [sessions[index] for index in drawn], times_rng
        ),
    )


def sampled_sessions() -> tuple[Conversation, ...]:
    """Every run of consecutive turns in the sample, all at time 0.

    The sample was drawn from pieces of at most about 2K tokens. Pieces that follow on
    each other are one session; a gap in a conversation starts another. Replies to a
    message outside the sample, and messages whose reply is outside, are left out. Four
    empty messages count as one token.
    """
    # Table row and message number rise together within a run.
    runs = groupby(
        enumerate(_messages().tolist()),
        key=lambda item: (item[1][0], item[0] - item[1][1]),
    )
    sessions = (_session([row for _, row in run]) for _, run in runs)
    return tuple(session for session in sessions if session is not None)


def message_lengths() -> MessageLengths:
    """The lengths of all messages of the sample, whether or not they form turns."""
    _, message, role, tokens = _messages().T
    is_user = role == _ROLES.index("user")
    is_first = message // 2 == 0
    return MessageLengths(
        first_user=tokens[is_user & is_first],
        later_user=tokens[is_user & ~is_first],
        assistant=tokens[role == _ROLES.index("assistant")],
    )


def _session(rows: list[list[int]]) -> Conversation | None:
    pairs = pair_turns((_ROLES[role], tokens) for _, _, role, tokens in rows)
    if not pairs:
        return None
    # Two messages a turn from the start of the conversation, as the source counts.
    first_turn = rows[pairs[0][0]][1] // 2 + 1
    return Conversation(
        session_id=f"sharegpt-{rows[0][0]}-{first_turn}",
        arrival_s=0.0,
        turns=tuple(
            Turn(new_tokens=user, output_tokens=reply) for _, user, reply in pairs
        ),
        first_turn=first_turn,
    )


def _messages() -> np.ndarray:
    """[num_messages, (conversation, message, role, tokens)], sorted."""
    table = np.loadtxt(_PATH, dtype=np.int64, delimiter=",", skiprows=1)
    table[:, 3] = np.maximum(table[:, 3], 1)
    return table
