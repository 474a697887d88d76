"""Conversations, their prompts, their scaling and their times."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.arrivals import Arrivals
from experiments.workload import Conversation, Turn, Workload

_LENGTHS = st.lists(
    st.lists(
        st.tuples(st.integers(1, 500), st.integers(1, 500)), min_size=1, max_size=6
    ),
    min_size=1,
    max_size=5,
)


def make_workload(lengths: list[list[tuple[int, int]]]) -> Workload:
    return Workload(
        name="made",
        conversations=tuple(
            Conversation(
                session_id=f"s{index}",
                arrival_s=float(index),
                turns=tuple(
                    Turn(new_tokens=new, output_tokens=reply) for new, reply in turns
                ),
            )
            for index, turns in enumerate(lengths)
        ),
    )


def test_describe_counts_what_recomputation_would_prefill_again():
    described = make_workload([[(10, 5), (4, 6)], [(7, 3)]]).describe()
    assert described["num_sessions"] == 2
    assert described["num_turns"] == 3
    assert described["multi_turn_share"] == 0.5
    assert described["new_tokens"] == 21
    assert described["output_tokens"] == 14
    assert described["longest_session_tokens"] == 25
    assert described["history_share"] == pytest.approx(15 / (21 + 15))


@given(_LENGTHS, st.floats(0.01, 4), st.integers(2, 2000))
def test_scaled_conversations_fit_and_are_beginnings(lengths, factor, max_tokens):
    workload = make_workload(lengths)
    fits = any(
        max(1, round(turns[0][0] * factor)) + max(1, round(turns[0][1] * factor))
        <= max_tokens
        for turns in lengths
    )
    if not fits:
        with pytest.raises(ValueError, match=f"max_tokens={max_tokens}"):
            workload.scaled(factor, max_tokens)
        return
    scaled = workload.scaled(factor, max_tokens)
    whole = {c.session_id: c for c in workload.conversations}
    for conversation in scaled.conversations:
        assert conversation.num_tokens <= max_tokens
        turns = whole[conversation.session_id].turns
        for turn, before in zip(conversation.turns, turns, strict=False):
            assert turn.new_tokens == max(1, round(before.new_tokens * factor))
            assert turn.output_tokens == max(1, round(before.output_tokens * factor))
    assert scaled.scale == factor
    left_out = scaled.counts["turns_past_max_tokens"]
    assert scaled.num_turns + left_out == workload.num_turns
    gone = scaled.counts["sessions_past_max_tokens"]
    assert scaled.num_sessions + gone == workload.num_sessions


def test_a_turn_past_the_window_takes_all_later_turns_with_it():
    workload = make_workload([[(10, 10), (50, 50), (1, 1)]])
    scaled = workload.scaled(1.0, 60)
    assert [turn.num_tokens for turn in scaled.conversations[0].turns] == [20]
    assert scaled.counts["turns_past_max_tokens"] == 2


def test_scaling_twice_multiplies_the_scale_and_adds_the_counts():
    workload = make_workload([[(100, 100), (100, 100), (100, 100)]])
    twice = workload.scaled(0.5, 250).scaled(0.5, 60)
    assert twice.scale == 0.25
    assert twice.num_turns == 1
    assert twice.counts["turns_past_max_tokens"] == 2


def test_scaling_keeps_the_first_token_ids():
    turn = Turn(new_tokens=4, output_tokens=4, token_ids=(9, 8, 7, 6))
    conversation = Conversation(session_id="a", arrival_s=0.0, turns=(turn,))
    workload = Workload(name="ids", conversations=(conversation,))
    assert workload.scaled(0.5, 8).conversations[0].turns[0].token_ids == (9, 8)
    with pytest.raises(ValueError, match="factor=2"):
        workload.scaled(2, 100)


@given(_LENGTHS, st.integers(2, 300), st.integers(0, 2**40))
def test_made_up_prompts_lie_in_the_vocabulary_and_repeat(lengths, vocab_size, seed):
    workload = make_workload(lengths)
    for conversation in workload.conversations:
        for index, turn in enumerate(conversation.turns):
            prompt = workload.prompt(conversation, index, vocab_size, seed)
            again = workload.prompt(conversation, index, vocab_size, seed)
            assert prompt.dtype == np.int32
            assert prompt.shape == (turn.new_tokens,)
            assert prompt.min() >= 1
            assert prompt.max() < vocab_size
            np.testing.assert_array_equal(prompt, again)


def test_made_up_prompts_use_all_ids_but_0_evenly():
    workload = make_workload([[(100_000, 1)]])
    prompt = workload.prompt(workload.conversations[0], 0, 11, seed=0)
    shares = np.bincount(prompt, minlength=11) / len(prompt)
    assert shares[0] == 0
    np.testing.assert_allclose(shares[1:], 0.1, atol=0.005)


def test_prompts_differ_by_seed_session_and_turn():
    workload = make_workload([[(50, 1), (50, 1)], [(50, 1)]])
    first, second = workload.conversations
    prompts = [
        workload.prompt(first, 0, 256, seed=0),
        workload.prompt(first, 1, 256, seed=0),
        workload.prompt(second, 0, 256, seed=0),
        workload.prompt(first, 0, 256, seed=1),
    ]
    assert len({tuple(prompt.tolist()) for prompt in prompts}) == 4


def test_prompt_is_the_message_where_its_tokens_are_known():
    turn = Turn(new_tokens=3, output_tokens=1, token_ids=(5, 0, 200))
    conversation = Conversation(session_id="a", arrival_s=0.0, turns=(turn,))
    prompt = Workload.prompt(conversation, 0, 256, seed=0)
    assert prompt.tolist() == [5, 0, 200]
    with pytest.raises(ValueError, match=r"0 to 200 do not fit vocab_size=200"):
        Workload.prompt(conversation, 0, 200, seed=0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"new_tokens": 0}, "new_tokens=0"),
        ({"output_tokens": -3}, "output_tokens=-3"),
        ({"think_s": -1.0}, "think_s=-1.0"),
        ({"think_s": math.nan}, "think_s=nan"),
        ({"think_s": math.inf}, "think_s=inf"),
        ({"token_ids": (1, 2)}, "2 tokens"),
    ],
)
def test_turn_refuses_what_cannot_be(fields, words):
    with pytest.raises(ValueError, match=words):
        Turn(**{"new_tokens": 5, "output_tokens": 5, **fields})


def test_conversation_and_workload_refuse_what_cannot_be():
    turn = Turn(new_tokens=1, output_tokens=1)
    late = Turn(new_tokens=1, output_tokens=1, think_s=2.0)
    with pytest.raises(ValueError, match="'a' has no turns"):
        Conversation(session_id="a", arrival_s=0.0, turns=())
    with pytest.raises(ValueError, match="arrival_s=-1"):
        Conversation(session_id="a", arrival_s=-1.0, turns=(turn,))
    with pytest.raises(ValueError, match=r"think_s=2\.0 must be 0"):
        Conversation(session_id="a", arrival_s=0.0, turns=(late,))
    with pytest.raises(ValueError, match="first_turn=0"):
        Conversation(session_id="a", arrival_s=0.0, turns=(turn,), first_turn=0)
    early = Conversation(session_id="a", arrival_s=1.0, turns=(turn,))
    later = Conversation(session_id="b", arrival_s=2.0, turns=(turn,))
    with pytest.raises(ValueError, match="no conversations"):
        Workload(name="w", conversations=())
    with pytest.raises(ValueError, match="session_id='a'"):
        Workload(name="w", conversations=(early, early))
    with pytest.raises(ValueError, match=r"arrival_s=1\.0 stands after"):
        Workload(name="w", conversations=(later, early))


def test_first_keeps_the_earliest_sessions():
    workload = make_workload([[(1, 1)], [(2, 2)], [(3, 3)]])
    assert workload.first(2).conversations == workload.conversations[:2]
    with pytest.raises(ValueError, match="num_sessions=4"):
        workload.first(4)


def test_sessions_arrive_as_a_poisson_process_and_users_think_lognormally():
    conversations = make_workload([[(1, 1)] * 3] * 4000).conversations
    arrivals = Arrivals(sessions_per_s=2.0, think_mu=3.0, think_sigma=0.5)
    timed = arrivals.schedule(conversations, np.random.default_rng(0))
    gaps = np.diff([0.0, *(c.arrival_s for c in timed)])
    think_s = np.array([turn.think_s for c in timed for turn in c.turns[1:]])
    # Mean and deviation of an exponential gap are equal.
    assert gaps.mean() == pytest.approx(0.5, rel=0.05)
    assert gaps.std() == pytest.approx(0.5, rel=0.05)
    assert np.log(think_s).mean() == pytest.approx(3.0, abs=0.03)
    assert np.log(think_s).std() == pytest.approx(0.5, abs=0.02)
    assert all(c.turns[0].think_s == 0 for c in timed)


def test_rate_stretches_arrivals_and_leaves_think_times():
    conversations = make_workload([[(1, 1)] * 3] * 20).conversations
    slow, fast = (
        Arrivals(sessions_per_s=rate).schedule(conversations, np.random.default_rng(5))
        for rate in (1.0, 4.0)
    )
    for one, other in zip(slow, fast, strict=True):
        assert one.arrival_s == pytest.approx(4 * other.arrival_s)
        assert one.turns == other.turns


def test_an_infinite_rate_starts_all_sessions_at_0():
    conversations = make_workload([[(1, 1)]] * 3).conversations
    timed = Arrivals(sessions_per_s=math.inf).schedule(
        conversations, np.random.default_rng(0)
    )
    assert [c.arrival_s for c in timed] == [0, 0, 0]


@pytest.mark.parametrize(
    "fields",
    [
        {"sessions_per_s": 0},
        {"sessions_per_s": math.nan},
        {"think_mu": 50},
        {"think_mu": math.nan},
        {"think_sigma": -1},
        {"think_sigma": math.inf},
    ],
)
def test_arrivals_refuse_what_cannot_be(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=name):
        Arrivals(**fields)


def test_workloads_load_neither_jax_nor_pandas():
    modules = "generator, mooncake, sampled_lengths, sharegpt, workload"
    code = (
        f"from experiments import {modules}\n"
        "import sys\n"
        "assert not {'jax', 'pandas', 'cachedattn_jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
