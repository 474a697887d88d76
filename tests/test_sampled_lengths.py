"""Sessions of real lengths, as shipped."""

import numpy as np
import pytest

from experiments.sampled_lengths import (
    SampleConfig,
    message_lengths,
    sample,
    sampled_sessions,
)


def test_message_lengths_are_the_published_ones():
    lengths = message_lengths()
    # Number, mean and median of the source's own table; one reply lay in two pieces.
    for kind, num, mean, median in [
        (lengths.first_user, 559, 142.3, 25),
        (lengths.later_user, 2969, 85.2, 18),
        (lengths.assistant, 3867 - 1, 345.8, 305),
    ]:
        assert len(kind) == num
        assert kind.mean() == pytest.approx(mean, abs=0.3)
        assert np.median(kind) == median


def test_sessions_are_runs_of_turns_that_begin_with_a_user():
    sessions = sampled_sessions()
    assert len(sessions) == 989
    assert sum(len(session.turns) for session in sessions) == 3527
    # The piece whose messages are 89 (a reply to nothing) to 95 has turns 46 to 48.
    first = sessions[0]
    assert first.first_turn == 46
    assert not first.starts_at_turn_1
    assert [(t.new_tokens, t.output_tokens) for t in first.turns] == [
        (6, 676),
        (18, 634),
        (10, 530),
    ]


def test_sessions_of_one_conversation_do_not_overlap():
    ends: dict[str, int] = {}
    for session in sampled_sessions():
        conversation = session.session_id.rsplit("-", 1)[0]
        assert session.first_turn >= ends.get(conversation, 1)
        ends[conversation] = session.first_turn + len(session.turns)


def test_sample_draws_no_session_twice_and_grows_by_appending():
    small = sample(SampleConfig(num_sessions=20, seed=4))
    large = sample(SampleConfig(num_sessions=60, seed=4))
    assert large.conversations[:20] == small.conversations
    assert len({c.session_id for c in large.conversations}) == 60
    assert sample(SampleConfig(num_sessions=20, seed=5)) != small


def test_sample_keeps_to_its_conditions():
    config = SampleConfig(num_sessions=100, min_turns=3, from_turn_1=True)
    conversations = sample(config).conversations
    assert all(len(c.turns) >= 3 for c in conversations)
    assert all(c.starts_at_turn_1 for c in conversations)
    assert all(turn.think_s > 0 for c in conversations for turn in c.turns[1:])
    assert conversations[0].arrival_s > 0


def test_quickstart_finds_24_sessions_with_100_turns():
    workload = sample(SampleConfig(num_sessions=24, min_turns=3))
    assert workload.num_turns >= 100


def test_asking_for_more_sessions_than_there_are_names_the_limit():
    with pytest.raises(ValueError, match="num_sessions=1000 exceeds the 989"):
        sample(SampleConfig(num_sessions=1000))
    with pytest.raises(ValueError, match="min_turns=0"):
        SampleConfig(min_turns=0)
