"""Truncation in the engine, against dense attention over the kept keys and values."""

import functools
import tempfile
from typing import Any

import numpy as np
import pytest

from cachedattn_jax.engine.overflow import Overflow
from cachedattn_jax.engine.request import Request
from cachedattn_jax.engine.truncation import TruncationConfig
from cachedattn_jax.model.config import RopeScaling
from cachedattn_jax.store.catalog import SessionRecord
from cachedattn_jax.store.chain import Chain
from cachedattn_jax.store.placement.tier import Tier
from tests.engines import (
    ask,
    assert_nothing_leaked,
    assert_same_reply,
    make_engine,
    random_tokens,
    tiny_model,
)
from tests.truncated_dense import replies

WINDOW = tiny_model()[0].window


@functools.cache
def engine_of(page_tokens: int, ratio: float = 0.5, keep_first_pages: int = 0):
    return make_engine(
        page_tokens=page_tokens,
        disk_pages=1000,
        disk_root=tempfile.mkdtemp(),
        truncation=TruncationConfig(ratio=ratio, keep_first_pages=keep_first_pages),
    )


def move_down(engine, tier: Tier) -> None:
    if tier is not Tier.DEVICE:
        engine.store.empty(Tier.DEVICE)
    if tier is Tier.DISK:
        engine.store.empty(Tier.HOST)


def record_of(engine, session: str) -> SessionRecord:
    record = engine.store.catalog.find("default", session)
    assert record is not None
    return record


def chain_of(engine, session: str) -> Chain:
    chain = record_of(engine, session).chain
    assert chain is not None
    return chain


def events(engine, session: str) -> list[tuple[int, list[int]]]:
    """What the record says was dropped, and when."""
    return [
        (item.at, [p for span in item.dropped for p in range(*span)])
        for item in record_of(engine, session).truncations
    ]


def assert_equals_dense(engine, session: str, turns, is_naive=False) -> None:
    """Every reply is that of dense attention over what the record says was kept."""
    conversation = engine.session(session).token_ids
    spans = [(len(t.prompt), len(t.prompt) + len(t.reply)) for t in turns]
    expected = replies(events(engine, session), conversation, spans, is_naive)
    for turn, (tokens, margins) in zip(turns, expected, strict=True):
        assert_same_reply(turn.reply, tokens, margins)
        if turn.reply == tokens:
            # Best minus second best logit, of prefill and decode alike.
            np.testing.assert_allclose(turn.margins, margins, atol=1e-4)


@pytest.mark.parametrize(("page_tokens", "ratio", "keep"), [(4, 0.5, 1), (16, 0.3, 0)])
@pytest.mark.parametrize("seed", [0, 1])
def test_after_any_truncations_tokens_equal_dense_attention_over_what_was_kept(
    page_tokens, ratio, keep, seed
):
    """Truncated at the start of turns and in replies, on page edges and off them, with
    moves to host and disk in between."""
    engine = engine_of(page_tokens, ratio, keep)
    rng = np.random.default_rng([seed, page_tokens])
    session, turns, num_dropped = f"s{seed}", [], 0
    for _ in range(6):
        new = random_tokens(rng, int(rng.integers(1, 60)))
        turn = ask(engine, session, new, max_tokens=int(rng.integers(1, 90)))
        turns.append(turn)
        assert turn.finish_reason == "length" and turn.is_exact
        assert turn.tokens_from.recomputed == 0
        assert turn.tokens_from.dropped == num_dropped or turn.num_truncations
        record = record_of(engine, session)
        num_dropped = sum(item.num_dropped for item in record.truncations)
        move_down(engine, list(Tier)[rng.integers(3)])
        salt = engine.store.salts.of("default")
        chain = Chain(layout=engine.store.layout, salt=salt)
        known = record.token_ids, record.truncations, record.cached_length
        assert record.chain == chain.after(*known), "keys do not follow from the record"
    assert sum(turn.num_truncations for turn in turns) >= 3
    assert_equals_dense(engine, session, turns)
    assert_nothing_leaked(engine)


@pytest.mark.parametrize("length", [WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + 4])
def test_a_prompt_at_the_edge_of_the_window_is_truncated_only_when_it_must(length):
    engine = engine_of(4)
    session = f"edge-{length}"
    rng = np.random.default_rng(length)
    first = ask(engine, session, random_tokens(rng, 41), max_tokens=8)
    second = ask(engine, session, random_tokens(rng, length - 49), max_tokens=1)
    assert second.num_truncations == (length > WINDOW)
    assert second.tokens_from.dropped == (48 if length > WINDOW else 0)
    third = ask(engine, session, [5], max_tokens=4)
    assert_equals_dense(engine, session, [first, second, third])


def test_a_prompt_longer_than_the_window_is_computed_in_pieces():
    engine = engine_of(4, 0.5, 1)
    rng = np.random.default_rng(0)
    first = ask(engine, "long", random_tokens(rng, 3 * WINDOW), max_tokens=30)
    assert first.num_truncations == 5  # 4 times in the prompt
    second = ask(engine, "long", random_tokens(rng, 7), max_tokens=5)
    assert_equals_dense(engine, "long", [first, second])
    again = ask(engine, "same", first.prompt.tolist(), max_tokens=5)
    assert again.reply == first.reply[:5]
    assert again.tokens_from.device > 0


def test_a_truncated_session_goes_on_after_a_restart(tmp_path):
    options = {"disk_pages": 1000, "disk_root": str(tmp_path)}
    rng = np.random.default_rng(0)
    with make_engine(**options) as engine:
        first = ask(engine, "a", random_tokens(rng, 50), max_tokens=80)
    with make_engine(**options) as engine:
        second = ask(engine, "a", random_tokens(rng, 20), max_tokens=60)
        assert second.tokens_from.disk > 0 and second.tokens_from.recomputed == 0
        assert_equals_dense(engine, "a", [first, second])


def test_turns_in_one_batch_overflow_independently():
    engine = make_engine(max_batch=3, page_tokens=4)
    rng = np.random.default_rng(0)
    turns = engine.run(
        Request(session_id=name, token_ids=random_tokens(rng, size), max_tokens=150)
        for name, size in {"a": 10, "b": 40, "c": 90, "d": 95}.items()
    )
    for turn in turns:
        assert turn.error is None and len(turn.reply) == 150
        assert_equals_dense(engine, turn.request.session_id, [turn])
    assert_nothing_leaked(engine)


def test_sessions_that_share_a_beginning_truncate_without_touching_each_other():
    engine = make_engine(max_batch=2, page_tokens=4)
    rng = np.random.default_rng(0)
    system = random_tokens(rng, 40)
    ask(engine, "warm", [*system, 1], max_tokens=1)
    turns = engine.run(
        Request(session_id=name, token_ids=[*system, last], max_tokens=130)
        for name, last in {"a": 7, "b": 8}.items()
    )
    for turn in turns:
        assert turn.tokens_from.device == 40
        assert_equals_dense(engine, turn.request.session_id, [turn])
    assert_nothing_leaked(engine)


def share_a_beginning(engine, requests) -> list:
    """Turns of sessions that begin with the same 10 pages, submitted together.

    Args:
        requests: by session, tokens of the prompt behind those pages and of the reply.
    """
    rng = np.random.default_rng(0)
    system = random_tokens(rng, 40)
    ask(engine, "warm", [*system, 1], max_tokens=1)
    return engine.run(
        Request(
            session_id=name,
            token_ids=[*system, *random_tokens(rng, size)],
            max_tokens=num_reply,
        )
        for name, (size, num_reply) in requests.items()
    )


@pytest.mark.parametrize("num_free", [0, 8])
def test_a_reply_waits_for_slots_that_a_truncation_needs(num_free):
    """Dropping shared pages frees nothing: others are needed, which a turn holds."""
    engine = make_engine(max_batch=2, page_tokens=4, device_pages=38 + num_free)
    turns = share_a_beginning(engine, {"a": (30, 90), "b": (1, 50)})
    assert engine.store.counters["truncations_paused"] == 1
    assert engine.store.counters["truncations_without_room"] == 0
    assert [turn.finish_reason for turn in turns] == ["length", "length"]
    assert turns[0].times.finished_s > turns[1].times.finished_s
    for turn in turns:
        assert_equals_dense(engine, turn.request.session_id, [turn])
    assert_nothing_leaked(engine)


def test_of_replies_that_wait_for_slots_of_each_other_one_ends_at_the_window():
    engine = make_engine(max_batch=2, page_tokens=4, device_pages=38)
    turns = share_a_beginning(engine, {"a": (30, 90), "b": (20, 90)})
    assert engine.store.counters["truncations_without_room"] == 1
    assert [turn.finish_reason for turn in turns] == ["window", "length"]
    assert len(turns[0].reply) == WINDOW - 70 + 1
    for turn in turns:
        assert_equals_dense(engine, turn.request.session_id, [turn])
    later = ask(engine, "a", [5], max_tokens=30)
    assert later.tokens_from.recomputed == 0
    assert_equals_dense(engine, "a", [turns[0], later])
    assert_nothing_leaked(engine)


@pytest.mark.parametrize("sizes", [(30, 20), (200, 10), (30, 172, 172)])
def test_a_pool_of_one_window_a_turn_has_the_slots_for_every_truncation(sizes):
    count = len(sizes)
    engine = make_engine(max_batch=count, page_tokens=4, device_pages=24 * count)
    requests = {name: (size, 150) for name, size in zip("abc", sizes, strict=False)}
    turns = share_a_beginning(engine, requests)
    assert turns[1].times.started_s < turns[0].times.finished_s, "they did not overlap"
    for turn in turns:
        assert turn.finish_reason == "length"
        assert_equals_dense(engine, turn.request.session_id, [turn])
    assert engine.store.counters["truncations_paused"] == 0
    assert_nothing_leaked(engine)


def test_a_prompt_waits_for_slots_that_its_truncations_need():
    engine = make_engine(max_batch=2, page_tokens=4, device_pages=38)
    turns = share_a_beginning(engine, {"a": (10, 40), "b": (200, 20)})
    for turn in turns:
        assert turn.error is None and turn.finish_reason == "length"
        assert_equals_dense(engine, turn.request.session_id, [turn])
    assert turns[1].times.started_s >= turns[0].times.finished_s
    assert_nothing_leaked(engine)


def test_two_thousand_tokens_past_the_window_take_no_memory_and_no_recomputation():
    engine = make_engine(page_tokens=4, max_batch=2, host_pages=60)
    prompt = random_tokens(np.random.default_rng(0), 20)
    turn = engine.session("a").submit(prompt, max_tokens=WINDOW + 2000)
    most_pages, programs = 0, []
    while not turn.is_finished:
        engine.step()
        free = engine.store.pool.num_free
        most_pages = max(most_pages, engine.store.pool.num_slots - free)
        if len(turn.reply) == WINDOW + 100:
            programs.append(num_programs())
    assert len(turn.reply) == WINDOW + 2000
    assert turn.num_truncations >= 2000 // (WINDOW // 2)
    assert most_pages <= engine.store.layout.num_pages(WINDOW)
    assert turn.tokens_from.new == 20 and turn.tokens_from.total == 20
    assert num_programs() == programs[0], "something was compiled on the way"
    assert_nothing_leaked(engine)


def num_programs() -> int:
    from cachedattn_jax.engine import decode, prefill, rewrite

    jitted: list[Any] = [decode._step, prefill._group, prefill._begin, rewrite._move]
    return sum(program._cache_size() for program in jitted)


def test_a_reply_goes_on_without_waiting_for_a_token(monkeypatch):
    """A truncation is decided before the host knows the token in flight."""
    engine = make_engine(page_tokens=4)
    unknown = []
    original = Overflow.make_room

    def make_room(self, job, settle):
        unknown.append(job.num_dispatched - len(job.turn.reply))
        return original(self, job, settle)

    monkeypatch.setattr(Overflow, "make_room", make_room)
    ask(engine, "a", random_tokens(np.random.default_rng(0), 20), max_tokens=150)
    assert len(unknown) == 2 and all(count >= 1 for count in unknown)


def test_rewinding_behind_a_truncation_undoes_it():
    engine = engine_of(4)
    rng = np.random.default_rng(0)
    first = ask(engine, "back", random_tokens(rng, 60), max_tokens=70)
    assert first.num_truncations == 1
    session = engine.session("back")
    session.rewind(80)
    second = ask(engine, "back", [3], max_tokens=4)
    assert second.tokens_from.dropped == 0
    assert_equals_dense(engine, "back", [second])
    session.forget()


def test_keys_after_a_truncation_never_meet_those_without_one():
    plain, truncated = make_engine(page_tokens=4), make_engine(page_tokens=4)
    rng = np.random.default_rng(0)
    history, more = random_tokens(rng, 90), random_tokens(rng, 30)
    ask(truncated, "a", history, max_tokens=1)
    ask(truncated, "a", more, max_tokens=1)
    kept = truncated.session("a").token_ids[48:]
    ask(plain, "a", kept, max_tokens=1)
    chains = [chain_of(engine, "a") for engine in (plain, truncated)]
    assert len(chains[0].keys) == len(chains[1].keys)
    assert not set(chains[0].keys) & set(chains[1].keys)


@pytest.mark.parametrize("lost_page", [0, 3, 11])
def test_a_page_lost_after_a_truncation_is_rebuilt_by_replaying_the_events(lost_page):
    engine = make_engine(page_tokens=4)
    rng = np.random.default_rng(lost_page)
    turns = [ask(engine, "a", random_tokens(rng, 30), max_tokens=100)]
    lose(engine, "a", lost_page)
    turns.append(ask(engine, "a", random_tokens(rng, 10), max_tokens=20))
    assert turns[-1].tokens_from.recomputed > 0
    assert turns[-1].is_exact and turns[-1].row()["is_exact"]
    assert_equals_dense(engine, "a", turns)
    assert_nothing_leaked(engine)


def test_a_page_that_would_take_too_long_to_rebuild_makes_the_turn_inexact():
    engine = make_engine(
        page_tokens=4, truncation=TruncationConfig(max_replay_tokens=50)
    )
    rng = np.random.default_rng(0)
    ask(engine, "a", random_tokens(rng, 30), max_tokens=100)
    lose(engine, "a", 0)
    turn = ask(engine, "a", random_tokens(rng, 10), max_tokens=8)
    assert not turn.is_exact and not turn.row()["is_exact"]
    assert turn.tokens_from.total == len(turn.prompt)
    kept = turn.prompt[turn.tokens_from.dropped :].tolist()
    fresh = ask(make_engine(page_tokens=4), "b", kept, max_tokens=8)
    assert turn.reply == fresh.reply, "it is not what is left of the text, either"
    later = ask(engine, "a", [4], max_tokens=2)
    assert not later.is_exact and later.tokens_from.recomputed == 0
    assert_nothing_leaked(engine)


def lose(engine, session: str, page: int) -> None:
    """Makes a page of a session disappear from every tier."""
    chain = chain_of(engine, session)
    engine.store._evictor.retire(engine.store.index.find(chain.keys[page]))


@pytest.mark.parametrize("policy", ["truncate_tokens_recompute", "invalidate"])
def test_recomputing_policies_equal_a_fresh_engine_that_is_given_what_is_left(policy):
    engine = make_engine(page_tokens=4, truncation=TruncationConfig(policy=policy))
    rng = np.random.default_rng(0)
    first = ask(engine, "a", random_tokens(rng, 60), max_tokens=60)
    assert first.finish_reason == "length" and first.num_truncations == 1
    said = [*first.prompt.tolist(), *first.reply]
    fresh = make_engine(page_tokens=4)
    rest = ask(fresh, "b", said[48 : WINDOW + 1], max_tokens=60 - (WINDOW + 1 - 60))
    assert rest.reply == first.reply[WINDOW + 1 - 60 :]
    second = ask(engine, "a", random_tokens(rng, 50), max_tokens=5)
    assert second.num_truncations == 1 and second.tokens_from.recomputed > 0
    assert_nothing_leaked(engine)


def test_the_naive_policy_keeps_keys_at_the_positions_they_had():
    engine = make_engine(page_tokens=4, truncation=TruncationConfig(policy="naive"))
    rng = np.random.default_rng(0)
    turns = [
        ask(engine, "a", random_tokens(rng, 61), max_tokens=90),
        ask(engine, "a", random_tokens(rng, 50), max_tokens=20),
    ]
    assert all(turn.num_truncations for turn in turns)
    assert_equals_dense(engine, "a", turns, is_naive=True)
    assert_nothing_leaked(engine)


@pytest.mark.parametrize("tier", list(Tier))
def test_discarded_tokens_are_gone_and_the_others_move_up(tier):
    engine = engine_of(4)
    rng = np.random.default_rng(0)
    name = f"discard-{tier}"
    turns = [ask(engine, name, random_tokens(rng, 50), max_tokens=9)]
    session = engine.session(name)
    session.discard([7, 8, 20, 33, 34, 35, 36, 57])
    move_down(engine, tier)
    turns.append(ask(engine, name, random_tokens(rng, 5), max_tokens=70))
    assert turns[-1].tokens_from.recomputed == 0
    session.discard(rng.permutation(np.arange(100, 120))[:9].tolist())
    turns.append(ask(engine, name, random_tokens(rng, 5), max_tokens=9))
    assert_equals_dense(engine, name, turns)
    lose(engine, name, 3)
    turns.append(ask(engine, name, random_tokens(rng, 2), max_tokens=9))
    assert turns[-1].is_exact and turns[-1].tokens_from.recomputed > 0
    assert_equals_dense(engine, name, turns)
    with pytest.raises(ValueError, match="token 7 of session.*cannot be discarded"):
        session.discard([9, 7])
    with pytest.raises(ValueError, match="first .* tokens"):
        session.discard([len(session.token_ids) - 1])
    assert_nothing_leaked(engine)


def test_refusing_takes_what_fits_and_no_more():
    engine = make_engine(truncation=TruncationConfig(policy="refuse"))
    turn = ask(engine, "a", [1] * (WINDOW - 3), max_tokens=50)
    assert turn.finish_reason == "window" and len(turn.reply) == 3
    with pytest.raises(ValueError, match=f"window of {WINDOW}"):
        engine.session("a").submit([1])


def test_a_window_without_pages_to_drop_is_refused_in_words():
    with pytest.raises(ValueError, match="keep_first_pages=5.*takes 112"):
        make_engine(page_tokens=16, truncation=TruncationConfig(keep_first_pages=5))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"policy": "shift"}, "policy='shift' is not one of"),
        ({"ratio": 1.0}, "ratio=1.0 must lie between 0 and 1"),
        ({"keep_first_pages": -1}, "keep_first_pages=-1 must be"),
        ({"max_replay_tokens": 0.5}, "max_replay_tokens=0.5 must be"),
    ],
)
def test_bad_settings_are_named_with_their_value(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        TruncationConfig(**fields)


def test_dynamic_ntk_is_refused_by_name_with_the_reason():
    with pytest.raises(ValueError, match="'dynamic'.*change with the sequence length"):
        RopeScaling(kind="dynamic", factor=2.0)


@pytest.mark.parametrize("has_loads", [False, True])
def test_a_turn_that_has_just_come_takes_no_slots_from_one_that_restarts(has_loads):
    engine = make_engine(
        page_tokens=4,
        max_batch=3,
        device_pages=52,
        loading="always",
        truncation=TruncationConfig(policy="truncate_tokens_recompute"),
    )
    rng = np.random.default_rng(0)
    if has_loads:
        ask(engine, "b", random_tokens(rng, 20))
        engine.store.saver.drain()
        engine.store.empty(Tier.DEVICE)
    prompt = random_tokens(rng, 60)
    turn = engine.session("a").submit(prompt, max_tokens=60)
    for _ in range(4):
        engine.step()
    engine.session("c").submit(prompt, max_tokens=36)
    while engine._loop._running.overflowed is None:
        engine.step()
    engine.session("b").submit(random_tokens(rng, 6 if has_loads else 30), max_tokens=9)
    engine.run_until_idle()
    assert turn.error is None and len(turn.reply) == 60
    assert_nothing_leaked(engine)
