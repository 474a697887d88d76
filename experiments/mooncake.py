"""Files in Mooncake's trace format: real arrivals, real prompt lengths.

Knows what a line must hold. Does not know how sessions follow, nor tokens.

    {"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}

One request a line, by time in ms. `input_length` counts all history; a hash id stands
for a block of 512 tokens of the prompt and all blocks before it. The trace that is
shipped is the conversation trace of Qin et al., FAST'25: 12,031 requests in one hour.
"""

import gzip
import json
import math
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.session_links import (
    BLOCK_TOKENS,
    TraceRequest,
    as_workload,
    link_sessions,
)
from experiments.workload import Workload

_PATH = Path(__file__).parent / "traces" / "mooncake_requests.csv.gz"


def read_trace(path: str | Path, *, block_tokens: int = BLOCK_TOKENS) -> Workload:
    """Reads a raw trace (.jsonl or .jsonl.gz) and links its requests to sessions."""
    requests = read_requests(path, block_tokens=block_tokens)
    sessions = link_sessions(requests, block_tokens=block_tokens)
    return as_workload(
        _name(path), [[requests[row] for row in rows] for rows in sessions]
    )


def read_requests(
    path: str | Path, *, block_tokens: int = BLOCK_TOKENS
) -> tuple[TraceRequest, ...]:
    """Reads the requests of a raw trace (.jsonl or .jsonl.gz)."""
    requests: list[TraceRequest] = []
    for where, line in _json_lines(Path(path)):
        request = TraceRequest(
            t_ms=_time(line, "timestamp", where),
            input_tokens=_length(line, "input_length", where),
            output_tokens=_length(line, "output_length", where),
            block_ids=_block_ids(line, where),
        )
        # Some writers leave out the last block when it is not full.
        num_blocks = len(request.block_ids) * block_tokens
        if abs(num_blocks - request.input_tokens) >= block_tokens:
            raise ValueError(
                f"{where}: {len(request.block_ids)} hash_ids, each of"
                f" {block_tokens} tokens, do not fit input_length="
                f"{request.input_tokens}"
            )
        if requests and request.t_ms < requests[-1].t_ms:
            raise ValueError(
                f"{where}: timestamp={request.t_ms} is before the {requests[-1].t_ms}"
                " of the request above; order requests by time"
            )
        requests.append(request)
    return tuple(requests)


def read_linked_sessions(path: str | Path) -> Workload:
    """Reads sessions that are linked already, one a line, by time of the first turn.

    {"session": 1, "turns": [{"t_ms": 0, "in": 7322, "out": 490}, ...]}, where `in`
    includes all history, as it does in a raw trace.
    """
    sessions: list[list[TraceRequest]] = []
    for where, line in _json_lines(Path(path)):
        session = _linked_session(line, where)
        if sessions and session[0].t_ms < sessions[-1][0].t_ms:
            raise ValueError(
                f"{where}: t_ms={session[0].t_ms} is before the"
                f" {sessions[-1][0].t_ms} of the session above; order sessions by time"
            )
        sessions.append(session)
    return as_workload(_name(path), sessions)


def shipped_sessions() -> Workload:
    """The 8,224 sessions of the shipped trace; their links are inferred, not known."""
    sessions: dict[int, list[TraceRequest]] = defaultdict(list)
    numbers = _table()[:, 0].tolist()
    for session, request in zip(numbers, shipped_requests(), strict=True):
        sessions[session].append(request)
    return as_workload("mooncake", list(sessions.values()))


def shipped_requests() -> tuple[TraceRequest, ...]:
    """The shipped trace, request by request, as it was published."""
    requests: list[TraceRequest] = []
    num_blocks = 0
    for _, t_ms, input_tokens, output_tokens, like, shared in _table().tolist():
        num_new = -(-input_tokens // BLOCK_TOKENS) - shared
        known = requests[like].block_ids[:shared] if shared else ()
        requests.append(
            TraceRequest(
                t_ms=t_ms,
                input_tokens=input_tokens,
                output_tokens=output_tokens,
                block_ids=(*known, *range(num_blocks, num_blocks + num_new)),
            )
        )
        num_blocks += num_new
    return tuple(requests)


def _linked_session(line: Any, where: str) -> list[TraceRequest]:
    turns = _field(line, "turns", where)
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{where}: turns={_short(turns)} must be a list of turns")
    session: list[TraceRequest] = []
    for number, turn in enumerate(turns):
        at = f"{where}, turn {number}"
        request = TraceRequest(
            t_ms=_time(turn, "t_ms", at),
            input_tokens=_length(turn, "in", at),
            output_tokens=_length(turn, "out", at),
        )
        if session and request.t_ms <= session[-1].t_ms:
            raise ValueError(
                f"{at}: t_ms={request.t_ms} must be after the {session[-1].t_ms} of the"
                " turn before"
            )
        session.append(request)
    return session


def _table() -> np.ndarray:
    """[requests, (session, t_ms, input, output, like_row, shared_blocks)]."""
    return np.loadtxt(_PATH, dtype=np.int64, delimiter=",", skiprows=1)


def _name(path: str | Path) -> str:
    return Path(path).name.split(".")[0]


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    is_empty = True
    # Not splitlines: inside JSON a string may hold other line ends.
    for number, text in enumerate(_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        where, is_empty = f"{path}, line {number}", False
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            raise ValueError(f"{where}: not JSON: {_short(text)}") from None
        yield where, line
    if is_empty:
        raise ValueError(f"{path}: the file is empty")


def _text(path: Path) -> str:
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: not a whole gzip file: {error}") from None
    return content.decode("utf-8-sig", errors="replace")


def _field(line: Any, name: str, where: str) -> Any:
    if not isinstance(line, dict):
        raise ValueError(f"{where}: {_short(line)} is not a JSON object")
    if name not in line:
        raise ValueError(f"{where}: field {name!r} is missing in {_short(line)}")
    return line[name]


def _time(line: Any, name: str, where: str) -> float:
    value = _field(line, name, where)
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise ValueError(f"{where}: {name}={_short(value)} must be ms from 0 on")
    return value


def _length(line: Any, name: str, where: str) -> int:
    value = _field(line, name, where)
    if type(value) is not int or value < 1:
        raise ValueError(
            f"{where}: {name}={_short(value)} must be a number of tokens from 1 on"
        )
    return value


def _block_ids(line: Any, where: str) -> tuple[int, ...]:
    value = _field(line, "hash_ids", where)
    if not isinstance(value, list) or any(type(block) is not int for block in value):
        raise ValueError(f"{where}: hash_ids={_short(value)} must be a list of numbers")
    return tuple(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
