"""Pages leave the device: when, once, within the buffer, without being waited for."""

import numpy as np
import pytest

from cachedattn_jax.engine.truncation import TruncationConfig
from cachedattn_jax.store.budget import SAVED_TOGETHER
from cachedattn_jax.store.link import EmulatedLink
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
)
from tests.test_overlap import request


def num_saved(engine) -> int:
    return sum(1 for _ in engine.store.index.in_tier(Tier.HOST))


def test_full_pages_leave_while_the_reply_still_grows():
    engine = make_engine(page_tokens=4)
    turn = engine.submit(request("a", random_tokens(np.random.default_rng(0), 9), 60))
    seen = []
    while not turn.is_finished:
        engine.step()
        seen.append((len(turn.reply), num_saved(engine)))
    before_end = [pages for length, pages in seen if length < 55]
    assert before_end[-1] >= 8
    assert before_end == sorted(before_end)
    assert_nothing_leaked(engine)


def test_pages_of_a_reply_become_findable_in_the_runs_that_are_saved_together():
    engine = make_engine(page_tokens=4)
    turn = engine.submit(request("a", random_tokens(np.random.default_rng(0), 13), 70))
    found = {}
    while not turn.is_finished:
        engine.step()
        if not turn.is_finished:
            num_pages = sum(1 for _ in engine.store.index.in_tier(Tier.DEVICE))
            found.setdefault(num_pages, len(turn.reply))
    # 3 pages of the prompt; a reply token is cached when the next one is known.
    assert found == {
        pages: max(1, 4 * pages - 13 + 1) for pages in range(3, 20, SAVED_TOGETHER)
    }
    assert num_saved(engine) == -(-(13 + 69) // 4)
    assert_nothing_leaked(engine)


@pytest.mark.parametrize("drop", [8, 12])
def test_pages_of_a_reply_past_the_window_leave_while_it_grows(drop):
    truncation = TruncationConfig(ratio=drop / 96)
    engine = make_engine(page_tokens=4, truncation=truncation)
    turn = engine.submit(request("a", random_tokens(np.random.default_rng(0), 9), 240))
    unsaved = []
    while not turn.is_finished:
        engine.step()
        pages = list(engine.store.index.in_tier(Tier.DEVICE))
        unsaved.append(sum(not page.is_saved for page in pages))
    assert turn.num_truncations >= 5
    # What is findable and not saved waits for a run that goes together.
    assert max(unsaved) <= 2 * SAVED_TOGETHER
    num_full = (len(turn.prompt) + 239) // 4
    saved_bytes = engine.store.counters["bytes_device_to_host"]
    assert saved_bytes >= (num_full - SAVED_TOGETHER) * engine.store.layout.page_bytes
    assert_nothing_leaked(engine)


@pytest.mark.parametrize("is_emulated", [False, True])
def test_on_a_cpu_pages_are_copied_once(is_emulated):
    engine = make_engine(page_tokens=4)
    if is_emulated:
        engine.store.links.emulate(EmulatedLink(bytes_per_s=1e9), None)
    prompt = random_tokens(np.random.default_rng(0), 70)
    first = ask(engine, "a", prompt, max_tokens=20)
    engine.store.saver.drain()
    slabs = [entry.slab for entry in engine.store.index.in_tier(Tier.HOST)]
    kinds = {
        group.sharding.memory_kind
        for slab in slabs
        if slab is not None
        for group in slab.groups
    }
    assert kinds == {"device" if is_emulated else "pinned_host"}
    to_tier(engine, Tier.HOST)
    turn = ask(engine, "a", [5])
    assert turn.tokens_from.host == len(first.prompt) + len(first.reply) - 1
    assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 4))
    engine.store.links.emulate(None, None)


def test_room_that_is_not_there_is_looked_for_when_it_may_have_come(monkeypatch):
    engine = make_engine(page_tokens=4, host_pages=8, max_batch=2)
    evictor = engine.store._evictor
    looks = []

    def counted(num_bytes, *, may_wait):
        looks.append(num_bytes)
        return make_host_room(num_bytes, may_wait=may_wait)

    make_host_room = evictor.make_host_room
    monkeypatch.setattr(evictor, "make_host_room", counted)
    rng = np.random.default_rng(0)
    # 8 pages of "a" fill host memory, and stay there while it runs.
    long = engine.submit(request("a", random_tokens(rng, 33), 40))
    while num_saved(engine) < 8:
        engine.step()
    short = engine.submit(request("b", random_tokens(rng, 40), 12))
    num_before = len(looks)
    while not short.is_finished:
        engine.step()
    assert len(looks) - num_before <= 6
    while not long.is_finished:
        engine.step()
    # Now pages of "a" may leave for those that wait.
    saved_bytes = engine.store.counters["bytes_device_to_host"]
    engine.step()
    assert engine.store.counters["bytes_device_to_host"] > saved_bytes
    assert_nothing_leaked(engine)


def test_a_long_prefill_leaves_layer_group_by_layer_group():
    engine = make_engine(page_tokens=4, layers_per_group=1)
    turn = ask(engine, "a", random_tokens(np.random.default_rng(0), 80))
    engine.store.saver.drain()
    saves = [e for e in engine.timeline.events if e.name == "save"]
    by_group = [int(str(e.details["group"])) for e in saves if "group" in e.details]
    assert sorted(by_group) == [0, 1, 2, 3]
    assert {e.details["turn"] for e in saves} == {"a#0"}
    pages = -(-(len(turn.prompt) + 3) // 4)
    assert sum(int(str(e.details["bytes"])) for e in saves) == (
        pages * engine.store.layout.page_bytes
    )
    assert turn.bytes_device_to_host == pages * engine.store.layout.page_bytes


def test_the_last_layer_group_leaves_behind_the_first_token(monkeypatch):
    engine = make_engine(page_tokens=4, layers_per_group=1)
    saver, prefill = engine.store.saver, engine._prefill
    first_token, sent = prefill.first_token, []

    def watched(*args, **kwargs):
        sent.append(engine.store.counters["bytes_device_to_host"])
        return first_token(*args, **kwargs)

    monkeypatch.setattr(prefill, "first_token", watched)
    turn = engine.submit(request("a", random_tokens(np.random.default_rng(0), 70)))
    while not turn.is_finished:
        engine.step()
    run_bytes = 16 * engine.store.layout.group_bytes
    assert sent == [3 * run_bytes]
    saver.drain()
    pages = -(-(len(turn.prompt) + 3) // 4)
    saved = engine.store.counters["bytes_device_to_host"]
    assert saved == pages * engine.store.layout.page_bytes
    assert_nothing_leaked(engine)


@pytest.mark.parametrize("bytes_per_s", [None, 1e5])
def test_no_more_pages_are_handed_over_than_tokens_can_wait_behind(bytes_per_s):
    engine = make_engine(page_tokens=4)
    links, saver = engine.store.links, engine.store.saver
    if bytes_per_s is None:
        links.device_to_host = link = HeldLink()
    else:
        links.emulate(EmulatedLink(bytes_per_s=bytes_per_s), None)
    turn = engine.submit(request("a", random_tokens(np.random.default_rng(0), 60), 20))
    most = 0
    while not turn.is_finished:
        engine.step()
        # When it ends, the rest follows at once.
        most = most if turn.is_finished else max(most, len(saver.under_way))
    # 15 pages are 6 runs. An emulated link carries no tokens, and two keep it busy.
    assert most == (1 if bytes_per_s is None else 2)
    assert num_saved(engine) == -(-(len(turn.prompt) + 19) // 4)
    if bytes_per_s is None:
        link.let_go(100)
    links.emulate(None, None)
    saver.drain()
    assert_nothing_leaked(engine)


def test_a_turn_that_ends_does_not_make_others_wait_for_its_pages():
    engine = make_engine(page_tokens=4)
    saver, rng = engine.store.saver, np.random.default_rng(0)
    engine.store.links.device_to_host = link = HeldLink()
    other = engine.submit(request("b", random_tokens(rng, 10), 60))
    turn = engine.submit(request("a", random_tokens(rng, 30), 2))
    while not turn.is_finished:
        engine.step()
    assert not other.is_finished and len(saver.under_way) <= 1
    while not other.is_finished:
        engine.step()
    # Nothing more will be computed: all that is left of both follows at once.
    assert num_saved(engine) == -(-31 // 4) + -(-69 // 4)
    link.let_go(100)
    saver.drain()
    assert_nothing_leaked(engine)


def test_only_new_pages_are_ever_copied_out():
    engine = make_engine(page_tokens=4)
    rng = np.random.default_rng(0)
    said = 0
    for _ in range(4):
        turn = ask(engine, "a", random_tokens(rng, 8), max_tokens=5)
        said = len(turn.prompt) + len(turn.reply)
    engine.store.saver.drain()
    full = (said - 1) // 4
    # Of each turn the full pages that are new, and its partly filled last page.
    copied = engine.store.counters["bytes_device_to_host"]
    assert copied <= (full + 4) * engine.store.layout.page_bytes
    assert num_saved(engine) == -(-(said - 1) // 4)


@pytest.mark.parametrize("policy", ["write_back", "write_through_selective"])
def test_lazy_policies_save_when_the_slot_is_needed_and_lose_nothing(policy):
    engine = make_engine(page_tokens=4, device_pages=60, write_policy=policy)
    rng = np.random.default_rng(0)
    said = {}
    ask(engine, "a", random_tokens(rng, 30))
    assert num_saved(engine) == 0
    if policy == "write_through_selective":
        ask(engine, "a", random_tokens(rng, 6))
        engine.store.saver.drain()
        assert num_saved(engine) > 0
    for _ in range(3):
        for name in "bcdef":
            turn = ask(engine, name, random_tokens(rng, 12))
            said[name] = len(turn.prompt) + len(turn.reply)
            assert turn.tokens_from.recomputed == 0
            assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 4))
    assert num_saved(engine) > 0
    assert_nothing_leaked(engine)


def test_lazy_pages_reach_the_disk_when_the_engine_closes(tmp_path):
    options = {
        "disk_pages": 500,
        "disk_root": str(tmp_path),
        "write_policy": "write_back",
    }
    engine = make_engine(**options)
    first = ask(engine, "a", random_tokens(np.random.default_rng(0), 30))
    engine.close()
    engine = make_engine(**options)
    turn = ask(engine, "a", [5])
    assert turn.tokens_from.disk == len(first.prompt) + len(first.reply) - 1
    assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 4))
    engine.close()


def test_the_write_buffer_is_bounded_and_waiting_for_it_is_counted():
    size = page_bytes(make_engine().model, 4)
    engine = make_engine(
        page_tokens=4,
        device_pages=30,
        write_policy="write_back",
        write_buffer_bytes=4 * size,
    )
    engine.store.links.emulate(EmulatedLink(bytes_per_s=200 * size), None)
    rng = np.random.default_rng(0)
    most = 0
    for name in "abcde":
        turn = engine.submit(request(name, random_tokens(rng, 40)))
        while not turn.is_finished:
            engine.step()
            most = max(most, engine.store.saver.buffered_bytes)
        assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 4))
    # A run larger than the buffer travels alone.
    assert 0 < most <= max(4, 16) * size
    assert engine.store.counters["save_wait_us"] > 0
    assert_nothing_leaked(engine)
    engine.store.links.emulate(None, None)
    engine.close()


def test_turns_do_not_wait_for_saves_that_fit_the_buffer():
    engine = make_engine(page_tokens=4, device_pages=30, write_policy="write_back")
    engine.store.links.emulate(EmulatedLink(bytes_per_s=1e5), None)
    rng = np.random.default_rng(0)
    for name in "abcd":
        ask(engine, name, random_tokens(rng, 40))
    assert engine.store.saver.buffered_bytes > 0
    assert engine.store.counters["save_wait_us"] < 50_000
    engine.store.links.emulate(None, None)


def test_synchronous_saving_has_saved_everything_when_a_turn_ends():
    engine = make_engine(page_tokens=4, is_saving_synchronous=True)
    engine.store.links.emulate(EmulatedLink(bytes_per_s=1e7), None)
    turn = ask(engine, "a", random_tokens(np.random.default_rng(0), 40), max_tokens=8)
    assert engine.store.saver.buffered_bytes == 0
    assert num_saved(engine) == -(-(len(turn.prompt) + 7) // 4)
    assert engine.store.counters["save_wait_us"] > 0


@pytest.mark.parametrize("host_pages", [0, 8])
def test_pages_wait_in_the_buffer_for_a_slow_disk_and_come_back_right(
    tmp_path, host_pages
):
    engine = make_engine(
        page_tokens=4,
        device_pages=30,
        host_pages=host_pages,
        disk_pages=500,
        disk_root=str(tmp_path),
    )
    size = engine.store.layout.page_bytes
    engine.store.links.emulate(None, EmulatedLink(bytes_per_s=500 * size))
    rng = np.random.default_rng(0)
    for _ in range(2):
        for name in "abcd":
            turn = ask(engine, name, random_tokens(rng, 20))
            assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 4))
            assert_nothing_leaked(engine)
    engine.store.links.emulate(None, None)
    engine.close()
    assert engine.store.saver.buffered_bytes == 0
