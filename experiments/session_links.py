"""Requests of a trace become the turns of sessions.

Knows prefix blocks and what history costs. Does not know files or tokens.

A trace does not say which requests belong to one session; it is inferred. A request
continues an earlier one if all of these hold:

- its prompt begins with all full blocks of the other's prompt, and these are at least
  `min_shared_blocks` (one block may be a system prompt that all share);
- it came later, with a longer prompt, at most `slack_tokens` shorter than the other's
  prompt and reply together (a reply that comes back as history has lost its special
  tokens and may be tokenised differently);
- no request before it continued the other.

Of several, the one with most full blocks is taken, and the latest of these. What
shares fewer blocks is missed, and a turn that is sent again starts a session of its
own, so the mean number of turns is a floor.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.workload import Conversation, Turn, Workload

BLOCK_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class TraceRequest:
    """One request as a server sees it.

    Attributes:
        input_tokens: the whole prompt, history included.
        block_ids: a name for each block of the prompt together with all before it; the
            last block may be partly filled. Empty where a trace does not tell.
    """

    t_ms: float
    input_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...] = ()


def link_sessions(
    requests: Sequence[TraceRequest],
    *,
    block_tokens: int = BLOCK_TOKENS,
    min_shared_blocks: int = 2,
    slack_tokens: int = 64,
) -> list[list[int]]:
    """Infers which requests are turns of one session: rows of `requests`, by session.

    The module says by which rule. Rows of a session, and sessions, are in order of
    arrival, as `requests` must be.
    """
    children: dict[tuple[int, int], int] = {}  # prefix tree; the root is 0
    open_rows: dict[int, list[int]] = defaultdict(list)  # by node of last full block
    sessions: list[list[int]] = []
    session_of: list[int] = []
    for row, request in enumerate(requests):
        node, nodes = 0, []
        for block_id in request.block_ids:
            node = children.setdefault((node, block_id), len(children) + 1)
            nodes.append(node)
        session = len(sessions)
        for node in reversed(nodes[min_shared_blocks - 1 :]):
            before = _latest(open_rows[node], requests, request, slack_tokens)
            if before is not None:
                open_rows[node].remove(before)
                session = session_of[before]
                break
        if session == len(sessions):
            sessions.append([])
        sessions[session].append(row)
        session_of.append(session)
        if request.input_tokens >= block_tokens:
            open_rows[nodes[request.input_tokens // block_tokens - 1]].append(row)
    return sessions


def as_workload(name: str, sessions: Sequence[Sequence[TraceRequest]]) -> Workload:
    """Turns prompts with history into new tokens, and arrivals into think times.

    A turn's new tokens are its prompt less the prompt and the reply before it. Where
    that is below 1, because the reply came back shorter, it is clipped to 1 and
    counted: from there on the conversation is longer than the recorded one, in the
    shipped trace by at most 65 tokens a clipped turn (301 of 3,807 later turns).
    """
    conversations = tuple(
        Conversation(
            session_id=f"{name}-{index}",
            arrival_s=session[0].t_ms / 1000,
            turns=(_first_turn(session[0]), *map(_later_turn, session, session[1:])),
        )
        for index, session in enumerate(sessions)
    )
    num_clipped = sum(
        _num_new_tokens(before, request) < 1
        for session in sessions
        for before, request in zip(session, session[1:], strict=False)
    )
    return Workload(
        name=name,
        conversations=conversations,
        is_open_loop=True,
        counts={"clipped_turns": num_clipped},
    )


def _first_turn(request: TraceRequest) -> Turn:
    return Turn(new_tokens=request.input_tokens, output_tokens=request.output_tokens)


def _later_turn(before: TraceRequest, request: TraceRequest) -> Turn:
    return Turn(
        new_tokens=max(1, _num_new_tokens(before, request)),
        output_tokens=request.output_tokens,
        think_s=(request.t_ms - before.t_ms) / 1000,
    )


def _num_new_tokens(before: TraceRequest, request: TraceRequest) -> int:
    return request.input_tokens - before.input_tokens - before.output_tokens


def _latest(
    rows: Sequence[int],
    requests: Sequence[TraceRequest],
    request: TraceRequest,
    slack_tokens: int,
) -> int | None:
    for row in reversed(rows):
        before = requests[row]
        least = before.input_tokens + max(1, before.output_tokens - slack_tokens)
        if request.t_ms > before.t_ms and request.input_tokens >= least:
            return row
    return None
