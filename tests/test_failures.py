"""A turn may be cancelled or fail at any stage: nothing leaks, the others go on."""

import threading

import jax
import numpy as np
import pytest

from cachedattn_jax.engine.staging import Staging
from cachedattn_jax.store import page_reader
from cachedattn_jax.store.catalog import session_key
from cachedattn_jax.store.objects.object_names import page_name
from cachedattn_jax.store.placement.tier import Tier
from tests.engines import (
    HeldLink,
    ask,
    assert_nothing_leaked,
    assert_same_reply,
    greedy_reply,
    make_engine,
    random_tokens,
)
from tests.test_engine_invariants import move_down
from tests.test_overlap import request


class Injected(RuntimeError):
    """What the tests raise."""


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """One with a session "a" whose 60 tokens lie in host memory."""
    monkeypatch.setattr(page_reader, "_LEAST_PART_BYTES", 1)
    threads = set(threading.enumerate())
    engine = make_engine(
        layers_per_group=1,
        max_batch=3,
        device_pages=120,
        disk_pages=500,
        disk_root=str(tmp_path),
        loading="always",
        read_buffer=1,
    )
    ask(engine, "a", random_tokens(np.random.default_rng(0), 56), max_tokens=5)
    move_down(engine, Tier.HOST)
    yield engine
    engine.store.links.emulate(None, None)
    engine.close()
    assert_nothing_leaked(engine)
    assert set(threading.enumerate()) <= threads


def assert_sound(engine) -> None:
    """Everything is given back, memory is charged for what is there, turns are right.

    The turn of a new session and of "a" still say what the dense model says.
    """
    engine.store.links.emulate(None, None)
    engine.run_until_idle()
    engine.store.saver.drain()
    assert engine.store.saver.buffered_bytes == 0
    assert sorted(engine._loop._running.free_seats) == [0, 1, 2]
    assert not engine._loop._staging.jobs and engine._loop._running.prefilling is None
    assert_nothing_leaked(engine)
    slabs = {
        id(entry.slab): entry.slab for entry in engine.store.index.in_tier(Tier.HOST)
    }
    charged = sum(slab.num_bytes for slab in slabs.values() if slab is not None)
    assert engine.store.host.used_bytes == charged
    for name in ("a", "new"):
        turn = ask(engine, name, [9, 8])
        assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 4))
    assert_nothing_leaked(engine)


def step_until(engine, reached) -> None:
    for _ in range(100_000):
        if reached():
            return
        engine.step()
    raise AssertionError("the stage was never reached")


# How many layer groups of the turn have arrived, and what is true of it then.
STAGES = {
    "waiting": (0, lambda engine, turn: True),
    "staged": (0, lambda engine, turn: turn in engine._loop._staging.jobs),
    "first group": (1, lambda engine, turn: prefill_group(engine, turn) == 1),
    "second group": (2, lambda engine, turn: prefill_group(engine, turn) == 2),
    "last group": (3, lambda engine, turn: prefill_group(engine, turn) == 3),
    "dispatched": (4, lambda engine, turn: turn in decoding(engine)),
    "decoding": (4, lambda engine, turn: len(turn.reply) == 2),
}


def prefill_group(engine, turn):
    job = engine._loop._running.prefilling
    if job is None or job.turn is not turn or job.prefill is None:
        return None
    return job.prefill.group


def decoding(engine):
    return [job.turn for job in engine._loop._running.decoding]


def turn_at(engine, stage):
    """A turn of "a" at that stage, while another session decodes; and that one's."""
    other = engine.submit(request("other", [1, 2, 3], 90))
    step_until(engine, lambda: bool(other.reply))
    link = engine.store.links.host_to_device = HeldLink()
    turn = engine.submit(request("a", [7] * 9, 12))
    num_arrived, is_reached = STAGES[stage]
    link.let_go(num_arrived)
    while not is_reached(engine, turn):
        # "dispatched" lasts until the same step has collected the first token.
        if prefill_group(engine, turn) is not None and stage == "dispatched":
            engine._loop._prefill_groups()
        else:
            engine.step()
        assert not turn.is_finished and not other.is_finished
    link.let_go(4)
    return turn, other


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DISK])
@pytest.mark.parametrize("stage", STAGES)
def test_a_turn_cancelled_at_any_stage_leaks_nothing(engine, stage, tier):
    move_down(engine, tier)
    turn, other = turn_at(engine, stage)
    turn.cancel()
    engine.run_until_idle()
    assert turn.finish_reason == "cancelled"
    assert other.finish_reason == "length"
    assert_same_reply(other.reply, *greedy_reply(other.prompt, 90))
    if turn.reply:
        assert_same_reply(turn.reply, *greedy_reply(turn.prompt, len(turn.reply)))
    assert_sound(engine)


@pytest.mark.parametrize("stage", STAGES)
def test_closing_the_engine_at_any_stage_ends_everything(engine, stage):
    turn, other = turn_at(engine, stage)
    engine.close()
    assert turn.finish_reason == other.finish_reason == "cancelled"
    assert_nothing_leaked(engine)


def failing_after(call, count):
    """`call`, which raises when it is called for the `count`-th time."""
    left = [count]

    def wrapped(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            raise Injected("injected")
        return call(*args, **kwargs)

    return wrapped


def losing_the_pool(engine, call, count):
    """The same, where the failing call has taken a donated pool with it."""
    left = [count]

    def wrapped(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            engine.store.pool.arrays[1].delete()
            raise jax.errors.JaxRuntimeError("out of memory")
        return call(*args, **kwargs)

    return wrapped


# Where a program can fail: who owns the call, its name, and which call of a turn.
PROGRAMS = {
    "install": ("pool", "install", (1, 3)),
    "compute": ("prefill", "compute", (1, 4)),
    "first token": ("prefill", "first_token", (1,)),
    "decode": ("decode", "run", (1, 3)),
}


def owner_of(engine, name):
    return {
        "pool": engine.store.pool,
        "prefill": engine._prefill,
        "decode": engine._decode,
        "catalog": engine.store.catalog,
        "saver": engine.store.saver,
    }[name]


@pytest.mark.parametrize("loses_pool", [False, True])
@pytest.mark.parametrize(
    ("program", "count"),
    [(name, count) for name, (_, _, counts) in PROGRAMS.items() for count in counts],
)
def test_a_program_that_fails_ends_its_turn_and_leaks_nothing(
    engine, monkeypatch, program, count, loses_pool
):
    owner, name, _ = PROGRAMS[program]
    holder = owner_of(engine, owner)
    call = getattr(holder, name)
    wrap = failing_after(call, count)
    if loses_pool:
        wrap = losing_the_pool(engine, call, count)
    with monkeypatch.context() as patch:
        patch.setattr(holder, name, wrap)
        turns = [
            engine.submit(request("a", [7] * 9, 6)),
            engine.submit(request("b", [1] * 20, 6)),
        ]
        engine.run_until_idle()
    errors = [turn for turn in turns if turn.finish_reason == "error"]
    assert errors
    for turn in errors:
        assert isinstance(turn.error, Injected | jax.errors.JaxRuntimeError)
    for turn in turns:
        assert_same_reply(turn.reply, *greedy_reply(turn.prompt, len(turn.reply)))
    assert_sound(engine)


def test_results_that_are_errors_end_the_turns_and_rebuild_the_pool(
    engine, monkeypatch
):
    """What an asynchronous failure looks like: the tokens cannot be read."""
    run = engine._decode.run

    def poisoned(rows, batch_size=None):
        sampled = run(rows, batch_size)
        sampled.token_ids.delete()
        return sampled

    with monkeypatch.context() as patch:
        patch.setattr(engine._decode, "run", poisoned)
        turns = [engine.submit(request(name, [1] * 9, 6)) for name in "abc"]
        engine.run_until_idle()
    assert {turn.finish_reason for turn in turns} == {"error"}
    assert_sound(engine)


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DISK])
@pytest.mark.parametrize("count", [1, 3])
def test_a_failed_copy_to_the_device_becomes_a_recompute(
    engine, monkeypatch, tier, count
):
    move_down(engine, tier)
    with monkeypatch.context() as patch:
        pool = engine.store.pool
        patch.setattr(pool, "put", failing_after(pool.put, count))
        turn = ask(engine, "a", [7] * 9)
    assert turn.tokens_from.recomputed == 60
    assert engine.store.counters["miss_copy_failed"] > 0
    assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 4))
    assert_sound(engine)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_failed_read_becomes_a_recompute_of_what_is_missing(
    engine, monkeypatch, count
):
    move_down(engine, Tier.DISK)
    part = page_reader.PageReader._part
    with monkeypatch.context() as patch:
        patch.setattr(page_reader.PageReader, "_part", failing_after(part, count))
        turn = ask(engine, "a", [7] * 9)
    assert engine.store.counters["miss_read_failed"] > 0
    assert 0 < turn.tokens_from.recomputed <= 60
    assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 4))
    assert_sound(engine)


@pytest.mark.parametrize(
    ("name", "count"),
    [("extract", 1), ("extract_group", 1), ("extract_group", 3), ("put_on_host", 1)],
)
def test_a_save_that_fails_costs_the_turn_nothing(engine, monkeypatch, name, count):
    rng = np.random.default_rng(1)
    pool = engine.store.pool
    with monkeypatch.context() as patch:
        patch.setattr(pool, name, failing_after(getattr(pool, name), count))
        turn = ask(engine, "long", random_tokens(rng, 80))
        engine.store.saver.drain()
    assert engine.store.counters["save_failures"] == 1
    assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 4))
    assert_sound(engine)


@pytest.mark.parametrize("name", ["extract", "put_on_host"])
def test_a_save_that_fails_on_its_way_through_to_disk_costs_nothing(
    tmp_path, monkeypatch, name
):
    engine = make_engine(host_pages=0, disk_pages=500, disk_root=str(tmp_path))
    pool = engine.store.pool
    with monkeypatch.context() as patch:
        patch.setattr(pool, name, failing_after(getattr(pool, name), 1))
        turn = ask(engine, "a", random_tokens(np.random.default_rng(0), 20))
    assert engine.store.counters["save_failures"] == 1
    assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 4))
    engine.store.saver.drain()
    assert engine.store.saver.buffered_bytes == 0
    assert_nothing_leaked(engine)
    engine.close()


def test_a_record_that_cannot_be_written_ends_the_turn(engine, monkeypatch):
    def refusing(record):
        raise Injected("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(engine.store.catalog, "commit", refusing)
        (turn,) = engine.run([request("b", [1, 2, 3])])
    assert turn.finish_reason == "error" and isinstance(turn.error, Injected)
    assert_sound(engine)


def test_a_bad_page_that_a_fetch_brings_too_is_not_waited_for_again_and_again(
    engine, tmp_path, monkeypatch
):
    """The turn does without it; the fetch it came with has not been taken in yet."""
    move_down(engine, Tier.DISK)
    session = session_key("default", "a")
    pages = engine.store.index.on_disk_only(session)
    path = tmp_path / page_name("default", pages[9].key)
    path.write_bytes(path.read_bytes()[:100])
    assert engine.store._fetcher.fetch(session)
    for copy in engine.store._fetcher.under_way:
        copy.wait()
    renewed, renew = [], Staging.renew

    def counted(self, job):
        renewed.append(job)
        assert len(renewed) < 10, "the same page is found bad for ever"
        renew(self, job)

    monkeypatch.setattr(Staging, "renew", counted)
    # The step would take in what was fetched.
    monkeypatch.setattr(engine.store._fetcher, "poll", lambda: None)
    turn = ask(engine, "a", [7])
    monkeypatch.undo()
    engine.store.settle()
    assert turn.error is None and len(renewed) == 1
    assert turn.tokens_from.disk == 9 * 4
    assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 4))
    assert_sound(engine)
