"""A user's own ShareGPT file."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.sharegpt import pair_turns, read_sharegpt


def tokenize(text: str) -> list[int]:
    """One token a word: its length."""
    return [len(word) for word in text.split()]


def write(path, entries) -> str:
    path.write_text(json.dumps(entries))
    return str(path)


def messages(*pairs: tuple[str, str]) -> dict:
    return {"id": "x", "conversations": [{"from": r, "value": v} for r, v in pairs]}


def lengths(workload) -> list[list[tuple[int, int]]]:
    return [
        [(turn.new_tokens, turn.output_tokens) for turn in conversation.turns]
        for conversation in workload.conversations
    ]


def test_turns_and_tokens_are_read(tmp_path):
    entry = messages(("human", "a bb ccc"), ("gpt", "d"), ("human", "e"), ("gpt", "f"))
    workload = read_sharegpt(write(tmp_path / "own.json", [entry]), tokenize)
    assert lengths(workload) == [[(3, 1), (1, 1)]]
    assert workload.conversations[0].turns[0].token_ids == (1, 2, 3)
    assert workload.conversations[0].turns[1].think_s > 0
    assert workload.name == "own"


def test_lengths_alone_can_be_kept(tmp_path):
    path = write(tmp_path / "own.json", [messages(("user", "a bb"), ("gpt", "c"))])
    workload = read_sharegpt(path, tokenize, keep_token_ids=False)
    assert workload.conversations[0].turns[0].token_ids is None
    assert lengths(workload) == [[(2, 1)]]


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([("user", "a"), ("assistant", "b c")], [(1, 2)]),
        ([("Human", "a"), ("ChatGPT", "b")], [(1, 1)]),
        ([("system", "s s"), ("human", "a"), ("gpt", "b")], [(3, 1)]),
        ([("human", "a"), ("human", "b"), ("gpt", "c"), ("gpt", "d d")], [(2, 3)]),
        ([("gpt", "x"), ("human", "a"), ("gpt", "b")], [(1, 1)]),
        ([("human", "a"), ("gpt", "b"), ("human", "x")], [(1, 1)]),
        ([("human", "a"), ("gpt", " "), ("human", "b"), ("gpt", "c")], [(2, 1)]),
    ],
)
def test_variants_in_the_wild_are_read(tmp_path, pairs, expected):
    path = write(tmp_path / "own.json", [messages(*pairs)])
    assert lengths(read_sharegpt(path, tokenize)) == [expected]


def test_entries_without_turns_are_counted_and_left_out(tmp_path):
    entries = [
        messages(),
        messages(("gpt", "x")),
        messages(("human", "x")),
        messages(("human", "a"), ("gpt", "b")),
    ]
    workload = read_sharegpt(write(tmp_path / "own.json", entries), tokenize)
    assert [c.session_id for c in workload.conversations] == ["own-3"]
    assert workload.counts["entries_without_turns"] == 3


def test_openai_names_and_an_entry_a_line_are_read(tmp_path):
    entry = {
        "messages": [
            {"role": "user", "content": "a\u2028b"},
            {"role": "assistant", "content": "c"},
        ]
    }
    path = tmp_path / "own.jsonl"
    line = json.dumps(entry, ensure_ascii=False)
    path.write_text(f"\ufeff{line}\n\n{line}\n", encoding="utf-8")
    assert lengths(read_sharegpt(path, tokenize)) == [[(2, 1)], [(2, 1)]]


def test_max_sessions_reads_from_the_start(tmp_path):
    entries = [messages(("human", "a " * n), ("gpt", "b")) for n in (1, 2, 3)]
    path = write(tmp_path / "own.json", entries)
    assert lengths(read_sharegpt(path, tokenize, max_sessions=2)) == [
        [(1, 1)],
        [(2, 1)],
    ]
    with pytest.raises(ValueError, match="max_sessions=0"):
        read_sharegpt(path, tokenize, max_sessions=0)


GOOD = messages(("human", "a"), ("gpt", "b"))


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"a": 1}, r"own\.json: \{'a': 1\} is not a list"),
        ([GOOD, 7], "entry 1: 7 is not an object"),
        ([GOOD, {"id": "q"}], "entry 1: `conversations` must be a list .* not None"),
        ([{"conversations": "hi"}], "entry 0: `conversations` must be a list"),
        ([GOOD, {"conversations": ["hi"]}], "entry 1, message 0: 'hi' is not"),
        ([messages(("robot", "a"))], "entry 0, message 0: `from` must be .* 'robot'"),
        ([{"conversations": [{"value": "a"}]}], "entry 0, message 0: `from`.* None"),
        ([{"conversations": [{"from": "gpt"}]}], "entry 0, message 0: `value`.* None"),
        ([messages()], "no entry holds"),
    ],
)
def test_a_bad_file_is_refused_by_path_and_entry(tmp_path, entries, words):
    path = write(tmp_path / "own.json", entries)
    with pytest.raises(ValueError, match=words) as error:
        read_sharegpt(path, tokenize)
    assert str(error.value).startswith(path)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_json_is_refused(tmp_path):
    path = tmp_path / "own.json"
    path.write_bytes(b"\xff\xfe[{")
    with pytest.raises(ValueError, match="own.json: not JSON"):
        read_sharegpt(path, tokenize)
    lines = tmp_path / "own.jsonl"
    lines.write_text(json.dumps(GOOD) + "\n{oops\n")
    with pytest.raises(ValueError, match="own.jsonl, line 2: not JSON"):
        read_sharegpt(lines, tokenize)


ROLES = st.sampled_from(["system", "user", "assistant"])


@given(st.lists(st.tuples(ROLES, st.integers(1, 9)), max_size=12))
def test_paired_turns_keep_every_token_between_first_question_and_last_reply(chat):
    turns = pair_turns(chat)
    roles = [role for role, _ in chat]
    if "user" not in roles or "assistant" not in roles[roles.index("user") :]:
        assert turns == []
        return
    start = roles.index("user")
    stop = len(roles) - roles[::-1].index("assistant")
    replies = sum(n for role, n in chat[start:stop] if role == "assistant")
    assert sum(reply for _, _, reply in turns) == replies
    last_user = max(i for i in range(stop) if roles[i] == "user")
    asked = sum(n for role, n in chat[: last_user + 1] if role != "assistant")
    assert sum(user for _, user, _ in turns) == asked
    places = [place for place, _, _ in turns]
    assert places == sorted(set(places))
    assert all(roles[place] == "user" for place in places)
