"""Experiments on simulations: measures, bounds and accounts, each checked plainly."""

import functools
import math
from typing import cast

import numpy as np
import pytest

from cachedattn_jax.run_directory import RunDirectory
from cachedattn_jax.simulator.simulation import Simulation
from cachedattn_jax.simulator.trace import Trace
from experiments import cluster, placement, short_queues
from experiments.blind_optimum import IdleTimes, blind_optimum
from experiments.capacity import ccput_bytes, most_distinct
from experiments.comparison import Comparison
from experiments.jobs import run_jobs
from experiments.outcome import play
from experiments.paper_setting import GB, TB, PaperSetting, mean_tokens
from experiments.placement_speed import Stopwatch, bytes_per_idle, live_trace
from experiments.queue_setting import QueueSetting

SMALL = PaperSetting(num_sessions=200, num_warm_up=100)


def test_mean_prompt_is_what_a_simulation_recomputes():
    system = SMALL.system("llama-65b", reuse="recompute")
    turns = Simulation(SMALL.trace(), system).run().turns
    prompt = (turns["new"] + turns["recomputed"]).mean()
    window = system.model.window
    assert mean_tokens(window, 200, 1.7, 0)[0] == pytest.approx(prompt, rel=1e-9)


def test_recomputing_takes_the_mean_prefill_that_speeds_are_taken_from():
    setting = PaperSetting(num_sessions=200, num_warm_up=0)
    found = play(setting, "llama-13b", reuse="recompute")
    assert found.hit == 0
    assert found.ttft_s == pytest.approx(0.884, rel=1e-6)
    assert found.cost(1.0) == 10.0  # two accelerators, no storage


def test_gpu_hours_of_the_paper_count_prefills_twice():
    found = play(SMALL, "llama-13b")
    assert found.gpu_h - found.gpu_once_h == pytest.approx(found.prefill_h)
    storage = 128 * 0.0088 + 10_000 * 0.000082
    assert found.cost(2.0) == pytest.approx(2 * (10 + storage))


def test_first_turns_count_as_misses_only_where_the_setting_says_so():
    found = play(SMALL, "llama-13b", host_bytes=10**15, disk_bytes=10**15)
    assert found.hit_later == pytest.approx(100)
    assert found.hit == found.hit_all < 100


def test_most_distinct_sessions_agree_with_looking_at_every_span():
    rng = np.random.default_rng(0)
    session, at_s = rng.integers(0, 12, 80), rng.random(80) * 50
    for span_s in (0.5, 7.0, 60.0):
        spans = [
            len(set(session[(at_s > end - span_s) & (at_s <= end)])) for end in at_s
        ]
        assert most_distinct(session, at_s, span_s) == max(spans)


def test_ccput_is_a_full_window_of_every_session():
    assert ccput_bytes(3, "llama-13b") == 3 * 4096 * 2 * 40 * 40 * 128 * 2


def test_blind_optimum_keeps_what_returns_and_gives_up_what_does_not():
    """Even sessions of class 1 return after a second, those of class 2 never."""
    sessions = np.arange(400)
    label = 1 + (sessions // 2) % 2
    idle = IdleTimes(
        idle_s=np.where(label == 1, 1.0, math.inf),
        num_bytes=np.ones(400),
        label=label,
        session=sessions,
        span_s=400.0,
        busy_bytes=0.0,
    )
    # 200 idle times of one second in 400 s: half a byte in the mean.
    assert blind_optimum(idle, 0.6) == 1.0
    assert blind_optimum(idle, 0.0) == 0.0


def test_a_difference_is_explained_where_it_exceeds_the_tolerance():
    facts = {"of": "LRU", "measure": "hit", "tolerance": 2.0, "why": "a reason"}
    near = Comparison(ours=41.0, published=40.0, **facts)
    far = Comparison(ours=37.0, published=40.0, **facts)
    unknown = Comparison(ours=37.0, published=None, **facts)
    assert (near.row()["why"], far.row()["why"]) == ("", "a reason")
    assert far.row()["difference"] == -3.0
    assert unknown.row()["difference"] is None


def test_jobs_return_in_order_and_raise_what_a_job_raised():
    jobs = {number: functools.partial(divmod, 17, number) for number in (5, 3, 4)}
    for num_processes in (1, 2):
        found = run_jobs(jobs, "jobs", num_processes)
        assert list(found.items()) == [(n, divmod(17, n)) for n in (5, 3, 4)]
    with pytest.raises(ValueError, match="num_processes=0"):
        run_jobs(jobs, "jobs", 0)
    with pytest.raises(ValueError, match="invalid literal"):
        run_jobs({0: functools.partial(int, "x"), 1: int}, "jobs", 2)


def test_policies_claim_the_distance_from_the_paper(tmp_path):
    outcomes = {
        (policy, 10, is_prefetching): play(
            SMALL,
            "llama-13b",
            policy,
            disk_bytes=TB // 5,
            is_prefetching=is_prefetching,
        )
        for policy in ("lookahead", "lru")
        for is_prefetching in (True, False)
    }
    claims = {claim.name: claim for claim in placement._claims(outcomes)}
    ours = outcomes["lookahead", 10, True].hit
    distance = claims["look-ahead, 10 TB: distance from the paper's hit rate"]
    assert distance.value == pytest.approx(abs(ours - 85.8))
    as_published = placement.as_published(outcomes)
    assert as_published["lru", 10] is outcomes["lru", 10, False]
    with pytest.raises(ValueError, match="lacks"):
        placement.run(RunDirectory(tmp_path), policies=("lru",))


SHORT = QueueSetting(num_sessions=150, think_sigma=1.0)


def test_a_store_that_holds_all_hits_always_and_belady_is_the_most():
    assert short_queues.play(SHORT, 10**15, "lru").hit == pytest.approx(100)
    hits = {
        policy: short_queues.play(SHORT, 4 * GB, policy).hit
        for policy in short_queues.POLICIES
    }
    assert hits["belady"] == max(hits.values())
    assert hits["lru"] < hits["belady"] - 5


def test_closing_conversations_leaves_room_for_those_that_go_on():
    ours = {closes: 0.0 for closes in (False, True)}
    for closes in ours:
        ours[closes] = short_queues.play(SHORT, 4 * GB, "lru", closes=closes).hit
    assert ours[True] > ours[False] + 1


def test_a_wrong_trace_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"neither sharegpt, mooncake nor a file"):
        QueueSetting(trace=str(tmp_path / "none.jsonl")).columns()
    path = tmp_path / "sessions.jsonl"
    path.write_text('{"session": 1, "turns": [{"t_ms": 0, "in": 9, "out": 4}]}\n')
    assert QueueSetting(trace=str(path)).columns().num_turns == 1
    with pytest.raises(ValueError, match="load=1.5"):
        QueueSetting(load=1.5)


def test_random_routing_finds_what_the_session_left_on_that_replica_only():
    facts = {"capacity_bytes": 10**15, "sessions_per_s": 0.1}
    both = {
        routing: cluster.serve(SHORT, 8, routing, **facts)
        for routing in cluster.ROUTINGS
    }
    assert both["affinity"].hit == pytest.approx(100)
    assert 0 < both["random"].hit < 60


def test_the_trace_of_live_conversations_has_all_of_them_alive_at_once():
    trace: Trace = live_trace(40, 0)
    rows = trace.first_row[:-1]
    second_s = trace.arrival_s + trace.think_s[rows + 1]
    assert second_s.min() >= trace.arrival_s.max()


def test_a_stopwatch_takes_off_what_it_measures_of_calls_that_do_nothing():
    class Watched:
        state = "seen through it"

        def work(self):
            return sum(range(20_000))

        def rest(self):
            return None

    watch = Stopwatch()
    watched = cast(Watched, watch.watched(Watched()))
    assert watched.state == "seen through it" and watch.seconds == 0
    assert watched.work() == sum(range(20_000))
    worked_s = watch.seconds
    assert worked_s > 0
    for _ in range(1000):
        watched.rest()
    # The clock is read 2000 times, which adds tens of microseconds if left in.
    assert abs(watch.seconds - worked_s) < 1000 * 2 * watch.empty_s


def test_an_idle_conversation_takes_bytes_that_do_not_grow_with_their_number():
    few, many = (bytes_per_idle("lru", count) for count in (500, 2000))
    assert 100 < many < 1.3 * few
