"""Mooncake traces: files, links between requests, and the shipped trace."""

import gzip
import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.mooncake import (
    read_linked_sessions,
    read_requests,
    read_trace,
    shipped_requests,
    shipped_sessions,
)
from experiments.session_links import TraceRequest, as_workload, link_sessions


def as_line(request: TraceRequest) -> str:
    return json.dumps(
        {
            "timestamp": request.t_ms,
            "input_length": request.input_tokens,
            "output_length": request.output_tokens,
            "hash_ids": request.block_ids,
        }
    )


def without_ids(workload):
    return [(c.arrival_s, c.turns) for c in workload.conversations]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The shipped trace, as the file that was published."""
    path = tmp_path_factory.mktemp("trace") / "conversation_trace.jsonl"
    path.write_text("".join(as_line(request) + "\n" for request in shipped_requests()))
    return path


def test_shipped_trace_is_the_published_one_to_the_last_byte(published):
    assert hashlib.sha256(published.read_bytes()).hexdigest() == (
        "b8cbb061a85206d729d91cdc2981f43c9e0d99209dce588d3af5f7934408b9df"
    )


def test_linking_the_raw_trace_gives_the_sessions_that_were_derived_from_it(published):
    assert without_ids(read_trace(published)) == without_ids(shipped_sessions())


def test_shipped_sessions_are_8224_with_1_46_turns():
    workload = shipped_sessions()
    assert workload.num_sessions == 8224
    assert workload.num_turns == 12031
    assert workload.num_turns / workload.num_sessions == pytest.approx(1.46, abs=0.005)
    assert workload.is_open_loop


def test_clipping_makes_shipped_conversations_at_most_65_tokens_a_turn_longer(
    published,
):
    workload = shipped_sessions()
    requests = shipped_requests()
    sessions = link_sessions(requests)
    num_clipped = 0
    for conversation, rows in zip(workload.conversations, sessions, strict=True):
        drift = conversation.num_tokens - (
            requests[rows[-1]].input_tokens + requests[rows[-1]].output_tokens
        )
        clipped = sum(
            requests[row].input_tokens
            <= requests[before].input_tokens + requests[before].output_tokens
            for before, row in zip(rows, rows[1:], strict=False)
        )
        num_clipped += clipped
        assert 0 <= drift <= 65 * clipped
    assert workload.counts["clipped_turns"] == num_clipped == 301


def test_history_becomes_new_tokens_and_gaps_become_think_times():
    session = [
        TraceRequest(t_ms=3000, input_tokens=2290, output_tokens=316),
        TraceRequest(t_ms=9500, input_tokens=2615, output_tokens=451),
        TraceRequest(t_ms=12000, input_tokens=3060, output_tokens=239),
    ]
    workload = as_workload("one", [session])
    (conversation,) = workload.conversations
    assert conversation.arrival_s == 3.0
    assert [t.new_tokens for t in conversation.turns] == [2290, 9, 1]
    assert [t.output_tokens for t in conversation.turns] == [316, 451, 239]
    assert [t.think_s for t in conversation.turns] == [0.0, 6.5, 2.5]
    assert workload.counts["clipped_turns"] == 1  # 3060 < 2615 + 451


# Of each session: tokens of its first prompt past two blocks, then (reply, new tokens).
TURNS = st.lists(st.tuples(st.integers(1, 900), st.integers(1, 900)), max_size=4)
SESSIONS = st.lists(
    st.tuples(st.integers(0, 900), TURNS, st.randoms(use_true_random=False)),
    min_size=1,
    max_size=5,
)


@given(SESSIONS, st.randoms(use_true_random=False))
def test_sessions_that_share_only_the_system_prompt_are_told_apart(plan, order):
    planted = [[(1024 + first, 5)] + [(0, 0)] * len(turns) for first, turns, _ in plan]
    for session, (_, turns, _) in zip(planted, plan, strict=True):
        for index, (reply, new_tokens) in enumerate(turns):
            prompt, _ = session[index]
            session[index] = prompt, reply
            session[index + 1] = prompt + reply + new_tokens, 5
    queue = [number for number, session in enumerate(planted) for _ in session]
    order.shuffle(queue)
    requests, rows = [], [[] for _ in planted]
    blocks: dict[int, list[int]] = {}
    num_blocks = 1
    for row, number in enumerate(queue):
        prompt, reply = planted[number][len(rows[number])]
        # Block 0 is everybody's; a partly filled block gets another id once it is full.
        known = blocks.get(number, [0])
        num_new = -(-prompt // 512) - len(known)
        ids = [*known, *range(num_blocks, num_blocks + num_new)]
        num_blocks += num_new
        blocks[number] = ids[: prompt // 512]
        rows[number].append(row)
        requests.append(
            TraceRequest(
                t_ms=row * 1000,
                input_tokens=prompt,
                output_tokens=reply,
                block_ids=tuple(ids),
            )
        )
    assert sorted(link_sessions(requests)) == sorted(rows)


def request(t_ms: int, prompt: int, reply: int, *block_ids: int) -> TraceRequest:
    return TraceRequest(
        t_ms=t_ms, input_tokens=prompt, output_tokens=reply, block_ids=block_ids
    )


def test_a_turn_sent_again_starts_a_session_of_its_own():
    question = request(0, 1100, 50, 0, 1, 2)
    answers = [request(3000, 1200, 50, 0, 1, 3), request(6000, 1200, 50, 0, 1, 4)]
    assert link_sessions([question, *answers]) == [[0, 1], [2]]


def test_a_prompt_shorter_than_history_by_more_than_the_slack_is_no_next_turn():
    question = request(0, 1100, 200, 0, 1, 2)
    assert link_sessions([question, request(3000, 1236, 1, 0, 1, 3)]) == [[0, 1]]
    assert link_sessions([question, request(3000, 1235, 1, 0, 1, 3)]) == [[0], [1]]


def test_requests_of_the_same_moment_are_never_linked():
    question = request(3000, 1100, 50, 0, 1, 2)
    assert link_sessions([question, request(3000, 1200, 50, 0, 1, 3)]) == [[0], [1]]


def test_the_longest_common_beginning_decides():
    short = request(0, 1100, 50, 0, 1, 2)
    long = request(1000, 1700, 50, 0, 1, 3, 4)
    follow_up = request(2000, 1800, 50, 0, 1, 3, 5)
    assert link_sessions([short, long, follow_up]) == [[0, 1, 2]]
    other = request(1000, 1700, 50, 0, 8, 3, 4)
    assert link_sessions([short, other, follow_up]) == [[0, 2], [1]]


LINE = {"timestamp": 5, "input_length": 600, "output_length": 3, "hash_ids": [0, 1]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"timestamp": -1}, "timestamp=-1"),
        ({"timestamp": 4}, "timestamp=4 is before the 5"),
        ({"timestamp": "noon"}, "timestamp='noon'"),
        ({"timestamp": True}, "timestamp=True"),
        ({"timestamp": float("nan")}, "timestamp=nan"),
        ({"input_length": 0}, "input_length=0"),
        ({"input_length": 2.5}, r"input_length=2\.5"),
        ({"output_length": 0}, "output_length=0"),
        ({"output_length": None}, "output_length=None"),
        ({"hash_ids": "abc"}, "hash_ids='abc'"),
        ({"hash_ids": [1, "b"]}, r"hash_ids=\[1, 'b'\]"),
        ({"hash_ids": [1]}, None),
        ({"hash_ids": []}, "0 hash_ids.* input_length=600"),
        ({"hash_ids": [1, 2, 3]}, "3 hash_ids.* input_length=600"),
    ],
)
def test_a_bad_line_of_a_trace_is_refused_by_its_number(tmp_path, change, words):
    path = tmp_path / "own.jsonl"
    path.write_text(f"{json.dumps(LINE)}\n\n{json.dumps({**LINE, **change})}\n")
    if words is None:  # the last block, partly filled, may be missing
        assert len(read_requests(path)) == 2
        return
    with pytest.raises(ValueError, match=words) as error:
        read_trace(path)
    assert str(error.value).startswith(f"{path}, line 3: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", list(LINE))
def test_a_missing_field_is_named(tmp_path, field):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({k: v for k, v in LINE.items() if k != field}))
    with pytest.raises(ValueError, match=f"line 1: field '{field}' is missing"):
        read_trace(path)


def test_what_is_no_trace_is_refused(tmp_path):
    path = tmp_path / "own.jsonl"
    for text, words in [
        ("", "the file is empty"),
        ("{oops", "line 1: not JSON: '{oops'"),
        ("[1]", r"line 1: \[1\] is not a JSON object"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_trace(path)
    packed = tmp_path / "own.jsonl.gz"
    for content in (b"plain", gzip.compress(b"x" * 99)[:20]):
        packed.write_bytes(content)
        with pytest.raises(ValueError, match="not a whole gzip file"):
            read_trace(packed)


def test_a_packed_trace_is_read(tmp_path):
    path = tmp_path / "own.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(LINE).encode()))
    workload = read_trace(path)
    assert workload.name == "own"
    assert workload.conversations[0].turns[0].new_tokens == 600


def linked(*turns: tuple[int, int, int]) -> str:
    rows = [{"t_ms": t, "in": i, "out": o} for t, i, o in turns]
    return json.dumps({"session": 0, "turns": rows})


def test_linked_sessions_are_read(tmp_path):
    path = tmp_path / "linked.jsonl"
    path.write_text(f"{linked((0, 100, 10), (5000, 130, 7))}\n{linked((3000, 9, 9))}\n")
    one, two = read_linked_sessions(path).conversations
    assert [(t.new_tokens, t.output_tokens) for t in one.turns] == [(100, 10), (20, 7)]
    assert one.turns[1].think_s == 5.0
    assert two.arrival_s == 3.0


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (linked((-5, 1, 1)), "line 2, turn 0: t_ms=-5"),
        (linked((50, 1, 1), (50, 9, 1)), "line 2, turn 1: t_ms=50 must be after"),
        (linked((50, 0, 1)), "line 2, turn 0: in=0"),
        (linked((50, 1, 0)), "line 2, turn 0: out=0"),
        (linked((9, 1, 1)), "line 2: t_ms=9 is before the 10"),
        (linked(), r"line 2: turns=\[\] must be"),
        ("{}", "line 2: field 'turns' is missing"),
        ('{"turns": [3]}', "line 2, turn 0: 3 is not"),
    ],
)
def test_a_bad_linked_session_is_refused_by_line_and_turn(tmp_path, line, words):
    path = tmp_path / "linked.jsonl"
    path.write_text(f"{linked((10, 1, 1))}\n{line}\n")
    with pytest.raises(ValueError, match=words):
        read_linked_sessions(path)
