"""Pages leave behind tokens where both go the same way, as they do from an accelerator.

A CPU has no such way of its own, so the pool is told here that its memory is not the
host's; everything else is real.
"""

import dataclasses

import numpy as np
import pytest

from cachedattn_jax.store.catalog import session_key
from cachedattn_jax.store.departures import _Run
from cachedattn_jax.store.device_pool import DevicePool
from cachedattn_jax.store.outbound import Outbound
from cachedattn_jax.store.placement.tier import Tier
from experiments.bench import to_tier
from tests.engines import (
    HeldLink,
    ask,
    assert_nothing_leaked,
    assert_same_reply,
    greedy_reply,
    make_engine,
    page_bytes,
    random_tokens,
    tiny_model,
)
from tests.test_overlap import request


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sent:
    """A copy that was handed over.

    Attributes:
        num_tokens: of the reply, known then.
        was_ready: whether its pages had been taken out, so that it started at once.
        num_under_way: copies that were under way then.
    """

    group: int | None
    num_tokens: int
    was_ready: bool
    num_under_way: int


@pytest.fixture
def apart(monkeypatch):
    """Pools whose device memory is not that of the host."""
    monkeypatch.setattr(DevicePool, "is_on_host", False)


def watch(monkeypatch, turns: list) -> list[Sent]:
    """Notes every copy of pages to the host, and the tokens known by then."""
    sent, send = [], Outbound.send

    def watched(self, slab, runs, turn, group=None):
        sent.append(
            Sent(
                group=group,
                num_tokens=sum(len(turn.reply) for turn in turns),
                was_ready=all(run.is_ready() for run in runs),
                num_under_way=len(self.copies),
            )
        )
        send(self, slab, runs, turn, group)

    monkeypatch.setattr(Outbound, "send", watched)
    return sent


def served(engine, turns: list, *requests):
    turns += [engine.submit(request) for request in requests]
    while not all(turn.is_finished for turn in turns):
        engine.step()
    return turns


@pytest.mark.parametrize("seed", range(3))
def test_runs_of_a_reply_go_one_at_a_time(apart, monkeypatch, seed):
    engine, turns = make_engine(page_tokens=4), []
    sent = watch(monkeypatch, turns)
    prompt = random_tokens(np.random.default_rng(seed), 30)
    served(engine, turns, request("a", prompt, 60))
    midway = [copy for copy in sent if copy.num_tokens < 60]
    assert len(midway) >= 4 and not any(copy.num_under_way for copy in midway)
    engine.store.saver.drain()
    to_tier(engine, Tier.HOST)
    again = ask(engine, "a", [5])
    assert again.tokens_from.host == len(prompt) + 59
    assert_same_reply(again.reply, *greedy_reply(again.prompt, 4))
    assert_nothing_leaked(engine)


@pytest.mark.parametrize("is_held", [False, True])
def test_one_more_step_is_in_flight_while_tokens_wait_behind_pages(apart, is_held):
    engine = make_engine(page_tokens=4)
    if is_held:  # nothing arrives meanwhile
        engine.store.links.device_to_host = link = HeldLink()
    prompt = random_tokens(np.random.default_rng(0), 60)
    turn = engine.submit(request("a", prompt, 20))
    in_flight = {True: set(), False: set()}
    while not turn.is_finished:
        engine.step()
        if 4 < len(turn.reply) < 17:
            is_late = engine.store.saver.delays_tokens
            in_flight[is_late].add(len(engine._loop._running.in_flight))
    # What is under way may arrive between the collecting and this look at it.
    assert in_flight[False] <= {1, 2} and in_flight[True] <= {2}
    assert not is_held or not in_flight[False]
    assert_same_reply(turn.reply, *greedy_reply(prompt, 20))
    if is_held:
        link.let_go(100)
    engine.store.saver.drain()
    assert_nothing_leaked(engine)


@pytest.mark.parametrize("layers_per_group", [1, 2, 4])
def test_the_last_layer_group_goes_when_the_first_token_is_there(
    apart, monkeypatch, layers_per_group
):
    engine = make_engine(page_tokens=4, layers_per_group=layers_per_group)
    turns: list = []
    sent = watch(monkeypatch, turns)
    prompt = random_tokens(np.random.default_rng(0), 70)
    served(engine, turns, request("a", prompt, 20))
    last = engine.store.layout.num_groups - 1
    of_prefill = [copy for copy in sent if copy.group is not None]
    assert [copy.group for copy in of_prefill] == list(range(last + 1))
    assert all(copy.num_tokens == 0 for copy in of_prefill[:-1])
    # Taken out behind the program of the first token, so that one has ended, too.
    assert of_prefill[-1].was_ready
    engine.store.saver.drain()
    saved = engine.store.counters["bytes_device_to_host"]
    assert saved == -(-(70 + 19) // 4) * engine.store.layout.page_bytes
    to_tier(engine, Tier.HOST)
    again = ask(engine, "a", [5])
    assert again.tokens_from.host == 70 + 19
    assert_same_reply(again.reply, *greedy_reply(again.prompt, 4))
    assert_nothing_leaked(engine)


def test_a_last_layer_group_that_is_not_there_yet_is_not_waited_for(apart, monkeypatch):
    engine, turns = make_engine(page_tokens=4, layers_per_group=1), []
    sent = watch(monkeypatch, turns)
    monkeypatch.setattr(_Run, "is_taken_out", False)
    served(engine, turns, request("a", random_tokens(np.random.default_rng(0), 70), 20))
    last = engine.store.layout.num_groups - 1
    # When the turn ends it leaves whatever waits behind it.
    assert [copy.num_tokens for copy in sent if copy.group == last] == [20]
    engine.store.saver.drain()
    assert_nothing_leaked(engine)


@pytest.mark.parametrize("reply", [1, 2, 5])
def test_what_waits_leaves_when_the_last_turn_ends(apart, reply):
    engine = make_engine(page_tokens=4, layers_per_group=1)
    engine.store.links.device_to_host = link = HeldLink()  # nothing arrives meanwhile
    prompt = random_tokens(np.random.default_rng(0), 70)
    served(engine, [], request("a", prompt, reply))
    pages = -(-(70 + reply - 1) // 4)
    in_host = list(engine.store.index.in_tier(Tier.HOST))
    assert len(in_host) == pages and not any(entry.is_saving for entry in in_host)
    link.let_go(100)
    engine.store.saver.drain()
    assert_nothing_leaked(engine)


def test_pages_that_wait_are_saved_when_their_slots_are_needed(apart):
    engine = make_engine(page_tokens=4, layers_per_group=1, device_pages=30)
    rng = np.random.default_rng(0)
    turns = [ask(engine, name, random_tokens(rng, 70), max_tokens=3) for name in "abcd"]
    for name, before in zip("abcd", turns, strict=True):
        turn = ask(engine, name, [5])
        assert turn.tokens_from.recomputed == 0
        assert len(turn.prompt) == len(before.prompt) + len(before.reply) + 1
        assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 4))
    assert_nothing_leaked(engine)


def test_a_copy_of_the_last_group_that_cannot_be_handed_over_costs_no_turn(
    apart, monkeypatch
):
    engine = make_engine(page_tokens=4, layers_per_group=1)
    send, last = Outbound.send, engine.store.layout.num_groups - 1

    def failing(self, slab, runs, turn, group=None):
        if group == last:
            raise MemoryError("no host memory")
        send(self, slab, runs, turn, group)

    monkeypatch.setattr(Outbound, "send", failing)
    prompt = random_tokens(np.random.default_rng(0), 70)
    turns = served(engine, [], request("a", prompt, 20))
    assert_same_reply(turns[0].reply, *greedy_reply(prompt, 20))
    monkeypatch.setattr(Outbound, "send", send)
    engine.store.saver.drain()
    assert engine.store.counters["save_failures"] == 1
    assert engine.store.saver.buffered_bytes == 0
    # Their slots still hold them.
    again = ask(engine, "a", [5])
    assert again.tokens_from.device == 70 + 19
    assert_same_reply(again.reply, *greedy_reply(again.prompt, 4))
    assert_nothing_leaked(engine)


@pytest.mark.parametrize("cancelled_at", [0, 1, 7])
def test_a_turn_that_is_cancelled_leaves_nothing_waiting(apart, cancelled_at):
    engine = make_engine(page_tokens=4, layers_per_group=1)
    turn = engine.submit(request("a", random_tokens(np.random.default_rng(1), 70), 20))
    while len(turn.reply) < cancelled_at:
        engine.step()
    turn.cancel()
    while not turn.is_finished:
        engine.step()
    engine.store.saver.drain()
    assert not engine.store.saver.departures._waiting
    assert engine.store.saver.buffered_bytes == 0
    assert_nothing_leaked(engine)


def waiting_pages(monkeypatch):
    """An engine with a turn that decodes, and the run of "a", whose turn has ended.

    The run waits as if the program before it had not ended; all else is saved.
    """
    engine = make_engine(page_tokens=4, layers_per_group=1)
    monkeypatch.setattr(_Run, "is_taken_out", False)
    prompt = random_tokens(np.random.default_rng(0), 70)
    turn = engine.submit(request("a", prompt, 3))
    other = engine.submit(request("b", [1, 2, 3], 60))
    while not turn.is_finished or len(other.reply) < 30:
        engine.step()
    (run,) = engine.store.saver.departures._waiting
    return engine, run


def test_pages_that_wait_when_their_slots_are_needed_are_found_by_the_next_turn(
    apart, monkeypatch
):
    engine, _ = waiting_pages(monkeypatch)
    engine.store.empty(Tier.DEVICE)
    turn = engine.submit(request("a", [5]))
    engine.run_until_idle()
    assert turn.tokens_from.recomputed == 0
    assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 4))
    engine.store.saver.drain()
    assert_nothing_leaked(engine)


def without_slots(engine) -> None:
    """Takes pages that wait from their slots and lets them wait."""
    engine.store._evictor.empty(Tier.DEVICE)


def test_pages_that_wait_outside_their_slots_are_forgotten_with_their_session(
    apart, monkeypatch
):
    engine, run = waiting_pages(monkeypatch)
    keys = [entry.key for entry in filter(None, run.entries)]
    without_slots(engine)
    engine.forget("default", "a").result()
    engine.run_until_idle()
    engine.store.saver.drain()
    session = session_key("default", "a")
    for tier in Tier:
        assert not list(engine.store.index.last_pages_first(session, tier))
    assert not any(map(engine.store.index.find, keys))
    assert_nothing_leaked(engine)


def test_pages_whose_first_groups_did_not_arrive_are_known_no_more(apart, monkeypatch):
    engine, run = waiting_pages(monkeypatch)
    keys = [entry.key for entry in filter(None, run.entries)]
    assert len(keys) == 16 and run.slab is not None
    run.slab.is_broken = True
    without_slots(engine)
    engine.run_until_idle()
    engine.store.saver.drain()
    assert not any(map(engine.store.index.find, keys))
    assert_nothing_leaked(engine)


def held_prefill(**options):
    """An engine in whose buffer a prefill of "a" has reserved room for 16 pages.

    It waits for pages from host memory while "b" decodes and 64 tokens of "x" are only
    on the device; also the turn of "a", and the link.
    """
    rng = np.random.default_rng(0)
    size = page_bytes(tiny_model()[0], 4)
    engine = make_engine(
        page_tokens=4,
        layers_per_group=1,
        loading="always",
        read_buffer=1,
        write_policy="write_through_selective",
        write_buffer_bytes=16 * size,
        max_batch=3,
        **options,
    )
    ask(engine, "a", random_tokens(rng, 5), 4)
    to_tier(engine, Tier.HOST)
    ask(engine, "x", random_tokens(rng, 61), 4)
    other = engine.submit(request("b", [1, 2, 3], 60))
    while not other.reply:
        engine.step()
    link = engine.store.links.host_to_device = HeldLink()
    link.let_go(1)
    turn = engine.submit(request("a", random_tokens(rng, 70), 3))
    while engine._loop._running.prefilling is None:
        engine.step()
        assert not other.is_finished
    assert engine.store.saver.buffered_bytes == 16 * size
    return engine, turn, link


def test_a_save_does_not_wait_for_the_room_that_a_prefill_has_reserved(apart):
    engine, turn, link = held_prefill()
    engine.store.empty(Tier.DEVICE)
    link.let_go(100)
    engine.run_until_idle()
    assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 3))
    again = ask(engine, "x", [5])
    assert again.tokens_from.host == 64
    assert_same_reply(again.reply, *greedy_reply(again.prompt, 4))
    engine.store.saver.drain()
    assert engine.store.saver.buffered_bytes == 0
    assert_nothing_leaked(engine)


def test_what_has_its_room_does_not_wait_behind_what_waits_for_room(apart):
    engine, turn, link = held_prefill(host_pages=20)
    engine.store.empty(Tier.DEVICE)
    assert engine.store.saver.departures._waiting  # 16 rows of 20 are reserved
    link.let_go(100)
    engine.run_until_idle()
    assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 3))
    assert not engine.store.saver.departures._waiting
    again = ask(engine, "x", [5])
    assert again.tokens_from.host == 64
    assert_same_reply(again.reply, *greedy_reply(again.prompt, 4))
    engine.store.saver.drain()
    assert engine.store.saver.buffered_bytes == 0
    assert_nothing_leaked(engine)


def test_a_copy_that_fails_while_its_pages_are_leased_ends_no_turn(apart, monkeypatch):
    rng = np.random.default_rng(0)
    engine = make_engine(
        page_tokens=4,
        layers_per_group=1,
        device_pages=40,
        write_policy="write_back",
        loading="always",
    )
    store = engine.store
    link = store.links.device_to_host = HeldLink()
    ask(engine, "a", random_tokens(rng, 60))
    store.empty(Tier.DEVICE)
    for name in "cd":
        ask(engine, name, random_tokens(rng, 60), 1)
    assert len(link.held) >= 1 and store.pool.num_free < 24
    save_now = store.saver.save_now

    def failing(victims, turn=""):
        for held in link.held:
            if not held.done():
                held.set_exception(MemoryError("no host memory"))
        store.saver._outbound.settle()
        save_now(victims, turn)

    monkeypatch.setattr(store.saver, "save_now", failing)
    turn = engine.submit(request("a", [5]))
    engine.run_until_idle()
    assert store.counters["save_failures"] > 0
    assert turn.error is None
    assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 4))
    monkeypatch.undo()
    link.let_go(1000)
    store.saver.drain()
    assert_nothing_leaked(engine)
