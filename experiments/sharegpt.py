"""A user's own file of ShareGPT conversations. Knows JSON and roles, no tokenizer.

The OpenAI names {messages: [{role, content}]} do as well. In the public copies called
"split" an entry is a piece of at most 2K tokens of a conversation; it is read as a
conversation of its own.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from experiments.arrivals import Arrivals
from experiments.workload import Conversation, Turn, Workload

Role = Literal["system", "user", "assistant"]
Content = TypeVar("Content", int, tuple[int, ...])

# The names that the public copies of ShareGPT use.
_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}


def read_sharegpt(
    path: str | Path,
    tokenize: Callable[[str], Sequence[int]],
    *,
    arrivals: Arrivals = Arrivals(),
    seed: int = 0,
    max_sessions: int | None = None,
    keep_token_ids: bool = True,
) -> Workload:
    """Reads a JSON list (or .jsonl) of {id, conversations: [{from, value}]}.

    Entries without a turn (see `pair_turns`) are counted and left out. ShareGPT has no
    times; `arrivals` and `seed` make them up.

    Args:
        tokenize: sees one message at a time.
        max_sessions: reads so many conversations from the start of the file.
        keep_token_ids: without, only the lengths stay, and prompts are made up.
    """
    path = Path(path)
    if max_sessions is not None and max_sessions < 1:
        raise ValueError(f"{max_sessions=} must be at least 1")
    conversations, num_empty = list[Conversation](), 0
    for index, entry in enumerate(_entries(path)):
        messages = _tokenized(_messages(entry, f"{path}, entry {index}"), tokenize)
        turns = _turns(messages, keep_token_ids)
        if not turns:
            num_empty += 1
            continue
        name = f"{path.stem}-{index}"
        conversations.append(Conversation(session_id=name, arrival_s=0.0, turns=turns))
        if len(conversations) == max_sessions:
            break
    if not conversations:
        raise ValueError(f"{path}: no entry holds a user message with a reply")
    return Workload(
        name=path.stem,
        conversations=arrivals.schedule(conversations, np.random.default_rng(seed)),
        counts={"entries_without_turns": num_empty},
    )


def pair_turns(
    messages: Iterable[tuple[Role, Content]],
) -> list[tuple[int, Content, Content]]:
    """(place of the user's message, message, reply) of every turn, in order.

    Messages of one role in a row are one message. A system message goes in front of the
    user's next one. Replies to nothing, at the start, and a message without a reply, at
    the end, are left out.
    """
    turns: list[tuple[int, Content, Content]] = []
    place = 0
    system = user = reply = None
    for index, (role, content) in enumerate(messages):
        if role == "system":
            system = _joined(system, content)
        elif role == "assistant":
            reply = None if user is None else _joined(reply, content)
        else:
            if user is not None and reply is not None:
                turns.append((place, user, reply))
                user = reply = None
            if user is None:
                place = index
            if system is not None:
                content, system = system + content, None
            user = _joined(user, content)
    if user is not None and reply is not None:
        turns.append((place, user, reply))
    return turns


def _turns(
    messages: Iterable[tuple[Role, tuple[int, ...]]], keep_token_ids: bool
) -> tuple[Turn, ...]:
    return tuple(
        Turn(
            new_tokens=len(user),
            output_tokens=len(reply),
            token_ids=user if keep_token_ids else None,
        )
        for _, user, reply in pair_turns(messages)
    )


def _joined(before: Content | None, content: Content) -> Content:
    return content if before is None else before + content


def _entries(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    if path.suffix == ".jsonl":
        # Not splitlines: inside JSON a string may hold other line ends.
        lines = enumerate(text.split("\n"), start=1)
        return [_json(line, f"{path}, line {n}") for n, line in lines if line.strip()]
    entries = _json(text, str(path))
    if not isinstance(entries, list):
        raise ValueError(
            f"{path}: {_short(entries)} is not a list of entries; a file with an entry"
            " a line must be named .jsonl"
        )
    return entries


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None


def _messages(entry: Any, where: str) -> Iterator[tuple[Role, str]]:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: {_short(entry)} is not an object")
    messages = entry.get("conversations", entry.get("messages"))
    if not isinstance(messages, list):
        raise ValueError(
            f"{where}: `conversations` must be a list of messages, not"
            f" {_short(messages)}"
        )
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(
                f"{where}, message {number}: {_short(message)} is not an object"
            )
        role = message.get("from", message.get("role"))
        if not isinstance(role, str) or role.lower() not in _ROLES:
            raise ValueError(
                f"{where}, message {number}: `from` must be one of"
                f" {', '.join(_ROLES)}, not {_short(role)}"
            )
        text = message.get("value", message.get("content"))
        if not isinstance(text, str):
            raise ValueError(
                f"{where}, message {number}: `value` must be a string,"
                f" not {_short(text)}"
            )
        yield _ROLES[role.lower()], text


def _tokenized(
    messages: Iterable[tuple[Role, str]], tokenize: Callable[[str], Sequence[int]]
) -> Iterator[tuple[Role, tuple[int, ...]]]:
    for role, text in messages:
        token_ids = tuple(int(token) for token in tokenize(text)) if text else ()
        if token_ids:
            yield role, token_ids


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
