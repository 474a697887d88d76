"""The generator against the paper's curves, at 20,000 sessions."""

import functools

import numpy as np
import pytest

from experiments.arrivals import Arrivals
from experiments.generator import GeneratorConfig, generate
from experiments.sampled_lengths import message_lengths
from experiments.workload import Workload

# Fig 2a of the paper: P(turns < k), conversations of at most 40 turns.
TURNS_BELOW = [
    *[(2, 0.302), (3, 0.448), (4, 0.546), (5, 0.621), (6, 0.678), (7, 0.725)],
    *[(8, 0.762), (9, 0.792), (10, 0.818), (12, 0.857), (15, 0.898), (20, 0.940)],
    *[(25, 0.966), (30, 0.981), (40, 0.999)],
]
# Fig 2b: share of sessions of at most so many tokens, among those up to 32K.
TOKENS_UP_TO = [
    *[(250, 0.103), (500, 0.203), (1000, 0.352), (1500, 0.461), (2000, 0.538)],
    *[(3000, 0.644), (4000, 0.716), (6000, 0.807), (8000, 0.855), (12000, 0.912)],
    *[(16000, 0.938), (20000, 0.974), (24000, 0.985), (32000, 1.0)],
]


@functools.cache
def generated(reply_scale: float = 1.5) -> Workload:
    return generate(GeneratorConfig(num_sessions=20_000, reply_scale=reply_scale))


def session_tokens(workload: Workload) -> np.ndarray:
    """Lengths of the sessions that the paper's figure shows."""
    tokens = np.array([c.num_tokens for c in workload.conversations])
    return tokens[tokens <= 32_000]


def distance_to_fig_2b(workload: Workload) -> float:
    tokens = session_tokens(workload)
    return max(abs((tokens <= most).mean() - share) for most, share in TOKENS_UP_TO)


def test_turn_counts_follow_fig_2a_within_one_point():
    turns = np.array([len(c.turns) for c in generated().conversations])
    for bound, share in TURNS_BELOW:
        assert (turns < bound).mean() == pytest.approx(share, abs=0.01)
    assert turns.max() <= 40
    assert turns.mean() == pytest.approx(5.75, abs=0.1)


def test_fewer_than_73_percent_are_multi_turn_because_fig_2a_ends_at_40_turns():
    turns = np.array([len(c.turns) for c in generated().conversations])
    assert (turns > 1).mean() == pytest.approx(1 - 0.302, abs=0.01)


def test_session_lengths_follow_fig_2b_within_four_points():
    assert distance_to_fig_2b(generated()) < 0.04
    tokens = session_tokens(generated())
    assert 3_300 < tokens.mean() < 3_750
    assert (tokens > 2000).mean() == pytest.approx(0.47, abs=0.04)
    assert (tokens > 4000).mean() == pytest.approx(0.30, abs=0.05)


def test_new_tokens_a_turn_are_as_many_as_in_the_paper():
    workload = generated()
    new_tokens = workload.describe()["new_tokens"]
    assert isinstance(new_tokens, int)
    assert 80 <= new_tokens / workload.num_turns <= 105


def test_replies_as_sampled_make_sessions_too_short():
    workload = generated(1.0)
    assert session_tokens(workload).mean() < 2_700
    assert distance_to_fig_2b(workload) > 0.09


def test_mean_length_and_fig_2b_cannot_both_be_met_by_longer_replies():
    workload = generated(1.7)
    assert session_tokens(workload).mean() == pytest.approx(3_750, rel=0.03)
    assert distance_to_fig_2b(workload) > 0.05


def test_every_message_has_a_length_of_the_sample():
    workload = generate(GeneratorConfig(num_sessions=500, reply_scale=1.0))
    lengths = message_lengths()
    for conversation in workload.conversations:
        first, *later = conversation.turns
        assert first.new_tokens in lengths.first_user
        assert all(turn.new_tokens in lengths.later_user for turn in later)
        assert all(t.output_tokens in lengths.assistant for t in conversation.turns)


def test_replies_of_one_conversation_are_alike_and_of_two_are_not():
    pairs = np.log(
        [
            (conversation.turns[0].output_tokens, conversation.turns[1].output_tokens)
            for conversation in generated().conversations
            if len(conversation.turns) > 1
        ]
    )
    within = np.corrcoef(pairs.T)[0, 1]
    across = np.corrcoef(pairs[1:, 0], pairs[:-1, 1])[0, 1]
    assert within == pytest.approx(0.54, abs=0.06)
    assert abs(across) < 0.03


def test_a_larger_workload_begins_with_the_smaller_one():
    small = generate(GeneratorConfig(num_sessions=30, seed=3))
    large = generate(GeneratorConfig(num_sessions=90, seed=3))
    assert large.conversations[:30] == small.conversations


def test_seed_decides_lengths_and_times_decide_nothing_else():
    def lengths(workload: Workload) -> list[list[int]]:
        return [[t.num_tokens for t in c.turns] for c in workload.conversations]

    base = generate(GeneratorConfig(num_sessions=50, seed=1))
    busy = Arrivals(sessions_per_s=9.0, think_sigma=2.0)
    same = generate(GeneratorConfig(num_sessions=50, seed=1, arrivals=busy))
    other = generate(GeneratorConfig(num_sessions=50, seed=2))
    assert lengths(base) == lengths(same)
    assert lengths(base) != lengths(other)


def test_generator_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="num_sessions=0"):
        GeneratorConfig(num_sessions=0)
    with pytest.raises(ValueError, match="reply_scale=0"):
        GeneratorConfig(reply_scale=0)
