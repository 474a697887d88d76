"""The real store does what placement wants, in time, and says what it did."""

import tempfile
from collections import Counter

import numpy as np
import pytest

from cachedattn_jax.engine.request import Request
from cachedattn_jax.store.placement.placement_config import PlacementConfig
from cachedattn_jax.store.placement.policies import POLICIES
from cachedattn_jax.store.placement.tier import Tier
from tests.engines import (
    ask,
    assert_nothing_leaked,
    assert_same_reply,
    greedy_reply,
    make_engine,
    random_tokens,
)


def engine_with(tmp_path, *, host_pages=60, disk_pages=500, **placement):
    engine_options = {
        name: placement.pop(name)
        for name in ("device_pages", "max_batch", "write_policy")
        if name in placement
    }
    return make_engine(
        host_pages=host_pages,
        disk_pages=disk_pages,
        disk_root=str(tmp_path) if disk_pages else None,
        placement=PlacementConfig(**placement),
        **engine_options,
    )


def assert_accounts_agree(engine) -> None:
    """What placement believes is what the index holds, byte by byte."""
    store = engine.store
    size, placement = store.layout.page_bytes, store.placement
    held: dict[str, Counter] = {}
    alone: Counter = Counter()
    for tier in Tier:
        for entry in store.index.in_tier(tier):
            assert tier in entry.tiers
            held.setdefault(entry.session, Counter())[tier] += size
            if tier is Tier.DISK and entry.is_on_disk_only:
                alone[entry.session] += size
    for session, standing in placement.standings.items():
        assert standing.num_bytes == held.pop(str(session), {})
        assert standing.disk_only_bytes == alone[str(session)]
    assert not held
    running = {turn.session for turn in engine.scheduler.running}
    waiting = Counter(turn.session for turn in engine.scheduler.waiting)
    for session, standing in placement.standings.items():
        assert standing.num_running == (session in running)
        assert len(standing.tickets) == waiting[str(session)]


def only_on_disk(engine, names, rng, num_tokens=20) -> None:
    for name in names:
        ask(engine, name, random_tokens(rng, num_tokens))
    engine.store.empty(Tier.DEVICE)
    engine.store.empty(Tier.HOST)


def test_pages_come_from_disk_before_their_turn_starts(tmp_path):
    engine = engine_with(tmp_path, policy="lookahead", max_batch=1, device_pages=30)
    rng = np.random.default_rng(0)
    only_on_disk(engine, "abcd", rng)
    first = Request(session_id="x", token_ids=random_tokens(rng, 5), max_tokens=20)
    rest = [
        Request(session_id=name, token_ids=random_tokens(rng, 3), max_tokens=2)
        for name in "abcd"
    ]
    turns = [engine.submit(request) for request in [first, *rest]]
    engine.step()
    engine.store.settle()
    assert not turns[0].is_finished
    engine.run_until_idle()
    for turn in turns[1:]:
        assert turn.tokens_from.recomputed == 0
        assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 2))
    # The first two may have been leased, and read, before; the others come from memory.
    assert all(turn.tokens_from.disk == 0 for turn in turns[3:])
    assert engine.store.counters["pages_fetched"] > 0
    assert_accounts_agree(engine)
    assert_nothing_leaked(engine)


def test_nothing_is_fetched_where_prefetching_is_switched_off(tmp_path):
    engine = engine_with(tmp_path, is_prefetching=False, max_batch=1)
    rng = np.random.default_rng(0)
    only_on_disk(engine, "ab", rng)
    requests = [
        Request(session_id=name, token_ids=random_tokens(rng, 3), max_tokens=2)
        for name in "ab"
    ]
    turns = engine.run(requests)
    assert engine.store.counters["pages_fetched"] == 0
    assert all(turn.tokens_from.disk >= 20 for turn in turns)


@pytest.mark.parametrize("granularity", ["pages", "sessions"])
def test_the_host_reserve_is_kept_free_and_nothing_is_lost_for_it(
    tmp_path, granularity
):
    engine = engine_with(
        tmp_path, policy="lru", host_reserve=0.5, granularity=granularity
    )
    rng = np.random.default_rng(0)
    for name in "abcdefgh":
        ask(engine, name, random_tokens(rng, 30))
        engine.store.settle()
        assert engine.store.host.has_room(engine.store.placement.room.reserve_bytes)
        assert_accounts_agree(engine)
    assert engine.store.counters["pages_left_host"] > 0
    assert engine.store.counters["pages_lost_from_host"] == 0


def test_the_reserve_takes_nothing_where_there_is_no_disk(tmp_path):
    engine = engine_with(tmp_path, host_pages=20, disk_pages=0, host_reserve=0.9)
    ask(engine, "a", random_tokens(np.random.default_rng(0), 40))
    engine.store.settle()
    assert engine.store.counters["pages_left_host"] == 0
    assert sum(1 for _ in engine.store.index.in_tier(Tier.HOST)) > 0


def test_idle_conversations_are_dropped_when_their_time_is_over(tmp_path):
    engine = engine_with(tmp_path, ttl_s=1e-9)
    ask(engine, "a", random_tokens(np.random.default_rng(0), 20))
    engine.store.settle()
    assert len(engine.store.index) == 0
    assert engine.store.disk is not None and engine.store.disk.num_objects == 0
    turn = ask(engine, "a", [5])
    assert turn.tokens_from.recomputed == 23
    assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 4))


def test_a_pinned_conversation_stays_and_the_device_still_serves(tmp_path):
    engine = engine_with(
        tmp_path, policy="lru", device_pages=26, host_pages=30, max_batch=1
    )
    rng = np.random.default_rng(0)
    ask(engine, "a", random_tokens(rng, 60))
    engine.session("a").pin()
    for name in "bcdef":
        ask(engine, name, random_tokens(rng, 60))
        assert_accounts_agree(engine)
    turn = ask(engine, "a", [5])
    assert turn.tokens_from.recomputed == turn.tokens_from.disk == 0
    assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 4))


def test_closed_conversations_are_the_first_to_go(tmp_path):
    engine = engine_with(tmp_path, policy="lru", host_pages=24, disk_pages=0)
    rng = np.random.default_rng(0)
    for name in "abc":
        ask(engine, name, random_tokens(rng, 20))
    engine.store.empty(Tier.DEVICE)
    engine.session("c").close()
    ask(engine, "d", random_tokens(rng, 30))
    engine.store.settle()
    left = {entry.session for entry in engine.store.index.in_tier(Tier.HOST)}
    assert left == {"default/a", "default/b", "default/d"}
    again = ask(engine, "a", [5])
    assert again.tokens_from.host == 23


def test_a_tenant_holds_no_more_than_its_quota(tmp_path):
    size = make_engine().store.layout.page_bytes
    engine = engine_with(tmp_path, policy="lru", quotas={"small": 8 * size})
    rng = np.random.default_rng(0)
    for name in "abcd":
        ask(engine, name, random_tokens(rng, 20), tenant="small")
        ask(engine, name, random_tokens(rng, 20), tenant="big")
        engine.store.settle()
        held = Counter(
            entry.session.split("/")[0]
            for tier in (Tier.HOST, Tier.DISK)
            for entry in engine.store.index.in_tier(tier)
        )
        assert held["small"] <= 8
        assert_accounts_agree(engine)
    assert held["big"] == 24


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_accounts_agree_after_any_sequence_of_turns(policy):
    """Random turns, cancellations, marks and failures of the disk, seeded."""
    rng = np.random.default_rng(sorted(POLICIES).index(policy))
    with tempfile.TemporaryDirectory() as root:
        engine = engine_with(
            root,
            policy=policy,
            host_pages=int(rng.integers(10, 60)),
            disk_pages=int(rng.integers(5, 60)),
            host_reserve=0.2,
            granularity=["pages", "sessions"][int(rng.integers(2))],
            ttl_s=[None, 0.05][int(rng.integers(2))],
            device_pages=50,
        )
        for _ in range(24):
            anything(engine, rng)
            for _ in range(rng.integers(0, 4)):
                engine.step()
                assert_accounts_agree(engine)
        engine.run_until_idle()
        engine.store.settle()
        assert_accounts_agree(engine)
        assert_nothing_leaked(engine)
        engine.close()


def anything(engine, rng) -> None:
    name = str(rng.choice(list("abcdefg")))
    session = engine.session(name)
    turns = engine.scheduler.running + engine.scheduler.waiting
    what = rng.choice(["ask"] * 5 + ["cancel", "close", "pin", "forget", "damage"])
    if what == "ask" and len(session.token_ids) < 40:
        pending = [t for t in turns if t.request.session_id == name]
        if len(pending) < 2:
            session.submit(random_tokens(rng, int(rng.integers(1, 20))), max_tokens=4)
    elif what == "cancel" and turns:
        turns[int(rng.integers(len(turns)))].cancel()
    elif what == "close":
        session.close()
    elif what == "pin":
        session.pin(bool(rng.random() < 0.5))
    elif what == "forget" and not any(t.request.session_id == name for t in turns):
        session.forget()
    elif what == "damage":
        # A page that vanishes from the disk is found out when it is read.
        entries = list(engine.store.index.in_tier(Tier.DISK))
        if entries:
            key = entries[int(rng.integers(len(entries)))].key.hex()
            engine.store.root.kv.write(f"pages/{key[:2]}/{key[2:]}", None).result()


@pytest.mark.parametrize(("host_pages", "disk_pages"), [(0, 0), (1, 1), (0, 2), (2, 0)])
def test_a_session_larger_than_every_tier_is_served_and_counted(
    tmp_path, host_pages, disk_pages
):
    for granularity in ("pages", "sessions"):
        engine = engine_with(
            tmp_path / granularity,
            host_pages=host_pages,
            disk_pages=disk_pages,
            granularity=granularity,
        )
        rng = np.random.default_rng(0)
        for _ in range(2):
            turn = ask(engine, "a", random_tokens(rng, 30))
            engine.store.empty(Tier.DEVICE)
            assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 4))
            assert_accounts_agree(engine)
        assert turn.tokens_from.recomputed > 0
        assert engine.store.counters["pages_not_saved"] > 0
        engine.close()
