"""What a user holds: streaming, stopping, cancelling, and errors of a program."""

import jax
import numpy as np
import pytest

from cachedattn_jax.engine.truncation import TruncationConfig
from tests.engines import (
    ask,
    assert_nothing_leaked,
    assert_same_reply,
    greedy_reply,
    make_engine,
    random_tokens,
)


def test_send_yields_the_reply_and_the_session_remembers_it():
    engine = make_engine()
    session = engine.session("a")
    reply = list(session.send([1, 2, 3], max_tokens=5))
    assert_same_reply(reply, *greedy_reply([1, 2, 3], 5))
    assert session.token_ids == [1, 2, 3, *reply]
    more = list(session.send([4], max_tokens=3))
    assert_same_reply(more, *greedy_reply([1, 2, 3, *reply, 4], 3))


def test_a_stop_token_ends_the_reply_and_is_part_of_it():
    engine = make_engine()
    whole = ask(engine, "a", [1, 2, 3], max_tokens=10).reply
    stop = whole[4]
    place = whole.index(stop)
    turn = ask(engine, "b", [1, 2, 3], max_tokens=10, stop_token_ids=(stop,))
    assert turn.reply == whole[: place + 1]
    assert turn.finish_reason == "stop"
    after = ask(engine, "b", [9])
    assert_same_reply(after.reply, *greedy_reply(after.prompt, 4))
    assert_nothing_leaked(engine)


def test_the_reply_ends_where_the_window_does_if_nothing_may_be_dropped():
    engine = make_engine(truncation=TruncationConfig(policy="refuse"))
    window = engine.model.window
    turn = ask(engine, "a", [1] * (window - 3), max_tokens=50)
    assert len(turn.reply) == 3
    assert turn.finish_reason == "window"


def test_leaving_the_loop_keeps_what_was_said_and_nothing_leaks():
    engine = make_engine()
    session = engine.session("a")
    reply = session.send([1, 2, 3], max_tokens=50)
    seen = [next(reply) for _ in range(3)]
    reply.close()
    engine.run_until_idle()
    kept = session.token_ids
    assert kept[: 3 + len(seen)] == [1, 2, 3, *seen]
    after = ask(engine, "a", [7])
    assert after.prompt.tolist() == [*kept, 7]
    assert_same_reply(after.reply, *greedy_reply(after.prompt, 4))
    assert_nothing_leaked(engine)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 6])
def test_a_turn_can_be_cancelled_at_any_step(steps):
    engine = make_engine()
    rng = np.random.default_rng(steps)
    turns = [
        engine.session(f"s{index}").submit(random_tokens(rng, 20), max_tokens=12)
        for index in range(4)
    ]
    for _ in range(steps):
        engine.step()
    turns[0].cancel()
    turns[3].cancel()
    engine.run_until_idle()
    assert turns[0].finish_reason == turns[3].finish_reason == "cancelled"
    assert all(len(turn.reply) == 12 for turn in turns[1:3])
    for turn in turns:
        session = engine.session(turn.request.session_id)
        if turn.reply:
            assert session.token_ids == [*turn.prompt, *turn.reply]
        assert_same_reply(turn.reply, *greedy_reply(turn.prompt, len(turn.reply)))
    assert_nothing_leaked(engine)


def test_closing_ends_every_turn():
    engine = make_engine()
    turns = [engine.session(name).submit([1, 2], max_tokens=9) for name in "abcd"]
    for _ in range(3):
        engine.step()
    engine.close()
    assert {turn.finish_reason for turn in turns} == {"cancelled"}
    assert_nothing_leaked(engine)


@pytest.mark.parametrize(
    ("program", "call"), [("_decode", "run"), ("_prefill", "compute")]
)
def test_a_program_that_fails_ends_its_turns_and_the_engine_goes_on(
    monkeypatch, program, call
):
    engine = make_engine()
    ask(engine, "a", [1, 2, 3, 4, 5, 6])
    turns = [engine.session(name).submit([1, 2], max_tokens=9) for name in "ab"]
    if program == "_decode":
        engine.step()
        engine.step()

    def failing(*args, **kwargs):
        for array in engine.store.pool.arrays:
            array.delete()  # what a donating call that fails late leaves behind
        raise jax.errors.JaxRuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(getattr(engine, program), call, failing)
        for _ in range(20):
            engine.step()
    assert {turn.finish_reason for turn in turns} == {"error"}
    assert "out of memory" in str(turns[0].error)
    assert_nothing_leaked(engine)
    turn = ask(engine, "a", [7])
    assert turn.tokens_from.device == 0
    assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 4))
