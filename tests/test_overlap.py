"""Loading overlaps computing: in this order, within this buffer, with these tokens."""

import dataclasses

import numpy as np
import pytest

from cachedattn_jax.engine.prospect import Prospects
from cachedattn_jax.engine.request import Request
from cachedattn_jax.store import page_reader
from cachedattn_jax.store.link import EmulatedLink
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


def request(session_id: str, tokens, max_tokens: int = 4) -> Request:
    return Request(
        session_id=session_id, token_ids=tuple(tokens), max_tokens=max_tokens
    )


@pytest.fixture
def parted_reads(monkeypatch):
    """Every layer group is a read of its own, however small."""
    monkeypatch.setattr(page_reader, "_LEAST_PART_BYTES", 1)


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DISK])
@pytest.mark.parametrize("read_buffer", [0, 1, 3, "auto"])
@pytest.mark.parametrize("is_preloading", [True, False])
@pytest.mark.parametrize("put_order", ["put_first", "compute_first"])
def test_tokens_do_not_depend_on_how_loading_overlaps(
    tmp_path, parted_reads, tier, read_buffer, is_preloading, put_order
):
    engine = make_engine(
        layers_per_group=1,
        disk_pages=500,
        disk_root=str(tmp_path),
        read_buffer=read_buffer,
        is_preloading=is_preloading,
        put_order=put_order,
    )
    rng = np.random.default_rng(0)
    ask(engine, "a", random_tokens(rng, 42))
    move_down(engine, tier)
    engine.store.links.emulate(EmulatedLink(bytes_per_s=2e7), None)
    turns = engine.run([request("b", random_tokens(rng, 30)), request("a", [5] * 20)])
    for turn in turns:
        assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 4))
    later = turns[1]
    assert dataclasses.asdict(later.tokens_from)[tier.value] == 45
    assert later.load_s > 0 and later.bytes_host_to_device > 0
    assert (later.bytes_disk_to_host > 0) == (tier is Tier.DISK)
    assert 0 <= later.exposed_stall_s
    if not is_preloading:
        assert later.exposed_stall_s > 0
    assert_nothing_leaked(engine)
    engine.close()


def recorded(engine) -> list[tuple[str, int]]:
    """What is put, installed and computed from now on, and the group it is for."""
    log: list[tuple[str, int]] = []
    pool, prefill = engine.store.pool, engine._prefill
    put, install, compute = pool.put, pool.install, prefill.compute
    num_puts = iter(range(1000))

    def logged_put(runs):
        log.append(("put", next(num_puts)))
        return put(runs)

    def logged_install(group, *args):
        log.append(("install", group))
        return install(group, *args)

    def logged_compute(group, step):
        log.append(("compute", group))
        return compute(group, step)

    pool.put, pool.install = logged_put, logged_install
    prefill.compute = logged_compute
    return log


@pytest.mark.parametrize("put_order", ["put_first", "compute_first"])
@pytest.mark.parametrize("read_buffer", [0, 1, 2, 3])
def test_groups_are_put_as_far_ahead_as_the_read_buffer_allows(put_order, read_buffer):
    engine = make_engine(
        layers_per_group=1, read_buffer=read_buffer, put_order=put_order
    )
    rng = np.random.default_rng(0)
    ask(engine, "a", random_tokens(rng, 30))
    move_down(engine, Tier.HOST)
    log = recorded(engine)
    ask(engine, "a", [7])
    ahead = max(1, read_buffer)
    assert [group for kind, group in log if kind == "put"] == [0, 1, 2, 3]
    for group in range(4):
        before = log[: log.index(("compute", group))]
        num_put = sum(kind == "put" for kind, _ in before)
        # Put first: the copy that overlaps this group has started, too.
        shown = group + ahead + (put_order == "put_first")
        assert num_put == min(4, shown)


@pytest.mark.parametrize("shares_link", [False, True])
def test_a_turn_that_starts_alone_does_not_crowd_the_link(shares_link):
    engine = make_engine(layers_per_group=1, read_buffer=3)
    engine.store.pool.platform = "gpu" if shares_link else "cpu"
    ask(engine, "a", random_tokens(np.random.default_rng(0), 30))
    move_down(engine, Tier.HOST)
    log = recorded(engine)
    turn = ask(engine, "a", [7])
    kinds = [kind for kind, _ in log]
    # One group at a time: each waits for the one before it to be installed, and for
    # nothing that computes.
    one_by_one = ["put", *["install", "put", "compute"] * 3, "install", "compute"]
    assert (kinds == one_by_one) == shares_link
    assert sorted(kinds) == sorted(one_by_one)
    assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 4))


@pytest.mark.parametrize("is_on_device", [True, False])
def test_a_turn_that_starts_at_once_is_laid_out_once(monkeypatch, is_on_device):
    engine = make_engine()
    ask(engine, "a", random_tokens(np.random.default_rng(0), 30))
    if not is_on_device:
        move_down(engine, Tier.HOST)
    laid_out, of = [], Prospects.of

    def counted(self, turn):
        laid_out.append(turn)
        return of(self, turn)

    monkeypatch.setattr(Prospects, "of", counted)
    turn = ask(engine, "a", [7])
    assert laid_out == [turn]
    assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 4))


def test_pages_of_the_next_turn_are_put_while_the_one_before_computes():
    engine = make_engine(layers_per_group=1, read_buffer=2)
    rng = np.random.default_rng(0)
    ask(engine, "a", random_tokens(rng, 30))
    move_down(engine, Tier.HOST)
    log = recorded(engine)
    turns = engine.run([request("b", random_tokens(rng, 20)), request("a", [7])])
    # Two groups, as many as the buffer holds, before anything of "b" computes.
    first = [group for kind, group in log[: log.index(("compute", 0))] if kind == "put"]
    assert first == [0, 1]
    for turn in turns:
        assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 4))


def test_others_decode_while_a_prefill_waits_for_its_next_layer_group():
    engine = make_engine(layers_per_group=1, read_buffer=0)
    rng = np.random.default_rng(0)
    ask(engine, "a", random_tokens(rng, 40))
    move_down(engine, Tier.HOST)
    other = engine.submit(request("b", [1, 2, 3], 60))
    while not other.reply:
        engine.step()
    link = engine.store.links.host_to_device = HeldLink()
    turn = engine.submit(request("a", [7]))
    for arrived in range(1, 5):
        before = len(other.reply)
        for _ in range(5):
            engine.step()
        assert len(other.reply) >= before + 4
        assert not turn.reply
        link.let_go(1)
        engine.step()
        job = engine._loop._running.prefilling
        group = 4 if job is None or job.prefill is None else job.prefill.group
        assert group == arrived
    engine.run_until_idle()
    assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 4))
    assert_same_reply(other.reply, *greedy_reply(other.prompt, 60))
    assert_nothing_leaked(engine)


@pytest.mark.parametrize("max_passes", [0, 1, 8])
def test_ready_turns_pass_one_whose_pages_are_on_their_way_but_not_too_often(
    max_passes,
):
    engine = make_engine(max_batch=5, max_passes=max_passes, max_staged=3)
    rng = np.random.default_rng(0)
    ask(engine, "slow", random_tokens(rng, 60))
    move_down(engine, Tier.HOST)
    link = engine.store.links.host_to_device = HeldLink()
    # One that decodes all the while, so that the engine does not wait for the pages.
    long = engine.submit(request("long", [1, 2, 3], 60))
    while not long.reply:
        engine.step()
    turns = [engine.submit(request(n, random_tokens(rng, 6))) for n in ("slow", *"bcd")]
    started: list[str] = []
    while not all(turn.is_finished for turn in turns):
        engine.step()
        running = [turn.request.session_id for turn in engine.scheduler.running]
        started += [name for name in running if name not in started]
        if len(started) == 1 + min(max_passes, 3):
            link.let_go(4)
    assert started.index("slow") == 1 + min(max_passes, 3)
    for turn in turns:
        assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 4))
    engine.run_until_idle()
    assert_nothing_leaked(engine)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_page_found_bad_in_its_last_layer_is_computed_again(
    tmp_path, parted_reads, platform
):
    """The first groups have been computed by then; the turn starts over without it."""
    options = {"layers_per_group": 1, "disk_pages": 500, "disk_root": str(tmp_path)}
    engine = make_engine(**options)
    first = ask(engine, "a", random_tokens(np.random.default_rng(0), 40))
    engine.close()
    paths = sorted(p for p in (tmp_path / "pages").rglob("*") if p.is_file())
    for path in paths[::3]:
        data = bytearray(path.read_bytes())
        data[-50] ^= 1
        path.write_bytes(data)
    engine = make_engine(**options)
    engine.store.links.emulate(None, EmulatedLink(bytes_per_s=1e6))
    engine.store.pool.platform = platform  # slots are sent, and anew with a new lease
    turn = ask(engine, "a", [5])
    assert engine.store.counters["miss_checksum"] >= 1
    assert turn.tokens_from.recomputed > 0
    assert turn.prompt.tolist() == [*first.prompt, *first.reply, 5]
    assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 4))
    engine.store.links.emulate(None, None)
    engine.store.pool.platform = "cpu"
    assert_nothing_leaked(engine)
    engine.close()


@pytest.mark.parametrize(
    ("bytes_per_s", "choices"), [(1e3, {"recompute"}), (1e12, {"load"})]
)
def test_a_calibrated_engine_recomputes_over_a_slow_link_and_says_why(
    bytes_per_s, choices
):
    engine = make_engine(chunk_tokens=(64,))
    rng = np.random.default_rng(0)
    ask(engine, "a", random_tokens(rng, 60))
    move_down(engine, Tier.HOST)
    slow = EmulatedLink(bytes_per_s=bytes_per_s)
    # Nothing is to be waited for while the link itself is measured.
    engine.calibrate()
    constants = engine.cost_model.constants
    assert constants is not None
    link = dataclasses.replace(
        constants.host_to_device, latency_s=0.0, bytes_per_s=slow.bytes_per_s
    )
    engine.cost_model.calibrate(dataclasses.replace(constants, host_to_device=link))
    turn = ask(engine, "a", [7])
    assert turn.decision in choices
    row = turn.row()
    assert row["decision"] == turn.decision and "ms" in str(row["decision_reason"])
    assert turn.tokens_from.recomputed == (63 if choices == {"recompute"} else 0)
    assert_same_reply(turn.reply, *greedy_reply(turn.prompt, 4))
    assert_nothing_leaked(engine)


@pytest.mark.parametrize("is_other_running", [False, True])
def test_staged_turns_give_their_slots_to_the_first_in_the_queue(is_other_running):
    """Or neither could ever start: together they need more slots than there are."""
    engine = make_engine(page_tokens=4, device_pages=24, max_batch=3)
    rng = np.random.default_rng(0)
    ask(engine, "a", random_tokens(rng, 40))
    move_down(engine, Tier.HOST)
    if is_other_running:
        running = engine.submit(request("b", [1, 2], 10))
        engine.step()
    first = engine.submit(request("new", random_tokens(rng, 60), 30))
    second = engine.submit(request("a", [7], 4))
    for _ in range(2000):
        engine.step()
        if engine.scheduler.is_idle:
            break
    assert first.finish_reason == second.finish_reason == "length"
    ended_s, began_s = first.times.finished_s, second.times.first_token_s
    assert ended_s is not None and began_s is not None and ended_s <= began_s
    for turn in (first, second):
        assert_same_reply(turn.reply, *greedy_reply(turn.prompt, len(turn.reply)))
    if is_other_running:
        assert_same_reply(running.reply, *greedy_reply(running.prompt, 10))
    assert_nothing_leaked(engine)
