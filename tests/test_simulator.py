"""A simulated system keeps its budgets, loses no token, and counts what it counts."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachedattn_jax.engine.cost_constants import Link
from cachedattn_jax.simulator.pages import first_pages
from cachedattn_jax.simulator.results import Results, Window
from cachedattn_jax.simulator.simulated_store import SimulatedStore
from cachedattn_jax.simulator.simulation import Simulation
from cachedattn_jax.simulator.virtual_link import VirtualLink
from cachedattn_jax.store.placement.placement import Placement
from cachedattn_jax.store.placement.policies import POLICIES
from tests.simulations import (
    Watched,
    random_trace,
    system,
    trace,
)

SOURCES = ("device", "host", "disk", "recomputed", "new")


def prompt_tokens(simulated) -> np.ndarray:
    return np.sum([simulated.turns[name] for name in SOURCES], axis=0)


def columns(simulated) -> dict[str, list]:
    return {name: simulated.turns[name].tolist() for name in simulated.turns.columns}


def sizes(draw) -> dict:
    """Budgets from nothing to plenty, and every rule that there is."""
    return {
        "policy": draw(st.sampled_from(sorted(POLICIES))),
        "device_pages": draw(st.sampled_from([None, 16, 18, 40])),
        "host_pages": draw(st.sampled_from([0, 1, 5, 20, 200])),
        "disk_pages": draw(st.sampled_from([0, 3, 30, 300])),
        "page_tokens": draw(st.sampled_from([4, 7, 16])),
        "host_reserve": draw(st.sampled_from([0.0, 0.1, 0.5])),
        "granularity": draw(st.sampled_from(["pages", "sessions"])),
        "is_prefetching": draw(st.booleans()),
        "ttl_s": draw(st.sampled_from([None, 4.0])),
        "default_quota": draw(st.sampled_from([None, 400])),
        "overflow": draw(st.sampled_from(["keep", "invalidate"])),
        "allocation": draw(st.sampled_from(["held", "window"])),
        "keeps_copies": draw(st.booleans()),
        "is_deciding": draw(st.booleans()),
        "is_preloading": draw(st.booleans()),
        "max_batch": draw(st.integers(1, 4)),
        "max_staged": draw(st.integers(0, 3)),
        "max_passes": draw(st.integers(0, 3)),
        "reuse": draw(st.sampled_from(["cached"] * 5 + ["recompute"])),
    }


@st.composite
def systems(draw):
    return sizes(draw)


@given(
    options=systems(),
    seed=st.integers(0, 10**6),
    is_open_loop=st.booleans(),
    num_replicas=st.sampled_from([1, 1, 3]),
    routing=st.sampled_from(["affinity", "random"]),
    closes=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_budgets_are_kept_at_every_event_and_sources_add_up(
    options, seed, is_open_loop, num_replicas, routing, closes
):
    played = random_trace(np.random.default_rng(seed), is_open_loop=is_open_loop)

    def play(of: type[Simulation] = Watched):
        return of(
            played,
            system(**options),
            num_replicas=num_replicas,
            routing=routing,
            closes=closes,
            seed=seed,
            keeps_moves=True,
        ).run()

    simulated = play()
    turns = simulated.turns
    total = prompt_tokens(simulated)
    assert all((turns[name] >= 0).all() for name in SOURCES)
    assert (turns["new"] >= 1).all()
    assert (total < 64).all()
    assert sorted(turns["order"]) == list(range(played.num_turns))
    for name in ("queue_s", "prefill_s", "stall_s"):
        assert (turns[name] >= -1e-9).all()
    assert (turns["stall_s"] <= turns["prefill_s"]).all()
    began = turns["arrived_s"] + turns["queue_s"]
    assert (turns["ended_s"] >= began + turns["prefill_s"] - 1e-9).all()
    again = play(Simulation)
    assert columns(again) == columns(simulated)
    assert again.moves == simulated.moves
    assert again.counters == simulated.counters


@given(options=systems(), seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_prompts_do_not_depend_on_budgets_policies_or_routing(options, seed):
    """What users say is one thing, what is cached of it another."""
    played = random_trace(np.random.default_rng(seed), most=9)
    options |= {"overflow": "keep", "allocation": "held", "page_tokens": 4}
    plenty = system(host_pages=10_000, disk_pages=0)
    expected = prompt_tokens(Simulation(played, plenty).run())
    for routing in ("affinity", "random"):
        simulated = Simulation(
            played, system(**options), num_replicas=3, routing=routing, seed=seed
        ).run()
        total = prompt_tokens(simulated)
        assert total.tolist() == expected.tolist()


@given(seed=st.integers(0, 10**6), num_places=st.sampled_from([1, 3, 6]))
@settings(max_examples=12, deadline=None)
def test_belady_is_an_upper_bound_for_equal_sizes(seed, num_places):
    """One memory, whole sessions of one size, turns one after the other."""
    rng = np.random.default_rng(seed)
    sessions = [
        (at, [(90.0 * rng.exponential() * (n > 0), 30, 2) for n in range(number)])
        for at, number in zip(
            np.sort(rng.uniform(0, 200, 15)), rng.integers(1, 6, 15), strict=True
        )
    ]
    played = trace(sessions, is_open_loop=True)
    hits = {}
    for policy in POLICIES:
        of = system(
            policy=policy,
            host_pages=num_places,
            disk_pages=0,
            allocation="window",
            granularity="sessions",
            max_batch=10,
        )
        simulated = Watched(played, of).run()
        hits[policy] = int((simulated.turns["host"] > 0).sum())
    assert max(hits.values()) == hits["belady"], hits


# ---- a session by hand ----


def test_a_conversation_by_hand():
    """Two turns of one session, whose cache lies in host memory."""
    played = trace([(1.0, [(0.0, 9, 3), (5.0, 4, 2)])])
    simulated = Watched(played, system(), keeps_moves=True).run()
    turns = simulated.turns
    # 9 tokens of prompt at 10 ms, then two steps of 20 ms.
    assert turns["prefill_s"][0] == pytest.approx(0.09)
    assert turns["ended_s"][0] == pytest.approx(1.0 + 0.09 + 2 * 0.02)
    assert turns["arrived_s"][1] == pytest.approx(turns["ended_s"][0] + 5.0)
    # 12 tokens were said, 11 have keys and values: two full pages and a tail of 3.
    assert [int(turns[name][1]) for name in SOURCES] == [0, 11, 0, 0, 5]
    # Fewer than four pages leave at the end of their turn, with its tail. Then 17
    # tokens take five pages, of which the first two are saved already.
    assert simulated.moves == [("save", 0, 3), ("save", 0, 3)]
    # 110 bytes over 10 kB/s for four layers: the first is not hidden by computing.
    assert turns["stall_s"][1] == pytest.approx(0.011 / 4)
    assert turns["prefill_s"][1] == pytest.approx(0.05 + 0.011 / 4)


def test_without_host_memory_pages_pass_it_on_their_way_to_disk():
    played = trace([(0.0, [(0.0, 9, 3), (50.0, 4, 2)])])
    of = system(host_pages=0, is_prefetching=False)
    simulated = Watched(played, of).run()
    assert [int(simulated.turns[name][1]) for name in SOURCES] == [0, 0, 11, 0, 5]
    assert simulated.turns["prefill_s"][1] >= 0.05


def test_a_session_larger_than_every_tier_is_counted_and_served():
    played = trace([(0.0, [(0.0, 30, 9), (5.0, 9, 2)])] * 3)
    simulated = Watched(played, system(host_pages=1, disk_pages=1)).run()
    assert simulated.counters["pages_bypassed"] > 0
    found = simulated.turns["host"] + simulated.turns["disk"]
    assert found.max() <= 8
    nothing = Watched(played, system(host_pages=0, disk_pages=0)).run()
    assert sum(int(nothing.turns[n].sum()) for n in ("device", "host", "disk")) == 0
    assert nothing.turns["recomputed"][1::2].tolist() == [38, 38, 38]


def test_closing_conversations_lets_others_stay():
    rng = np.random.default_rng(0)
    played = random_trace(rng, 60, size=8)
    hits = {}
    for closes in (False, True):
        of = system(policy="lru", host_pages=30, disk_pages=0, max_batch=8)
        hits[closes] = int(Watched(played, of, closes=closes).run().turns["host"].sum())
    assert hits[True] > 1.1 * hits[False]


def test_a_cache_whose_positions_are_baked_in_is_lost_when_the_window_overflows():
    turns = [(0.0, 20, 4)] + [(1.0, 20, 4)] * 4
    played = trace([(0.0, turns)])
    kept = Watched(played, system(overflow="keep")).run().turns
    lost = Watched(played, system(overflow="invalidate")).run().turns
    assert kept["recomputed"].sum() == 0
    assert lost["recomputed"].sum() > 0
    assert lost["recomputed"][1] == 0


def test_sessions_stay_with_their_replica_or_are_dealt_at_random():
    played = random_trace(np.random.default_rng(3), 60, most=6)
    hits = {}
    for routing in ("affinity", "random"):
        watched = Watched(
            played, system(host_pages=500), num_replicas=4, routing=routing, seed=5
        )
        simulated = watched.run()
        hits[routing] = simulated.measured().hit_rate(by="tokens", counts_first=False)
        homes = [set(r.store.index.sessions) for r in watched.replicas]
        apart = sum(len(a & b) for a, b in itertools.combinations(homes, 2))
        assert (apart == 0) == (routing == "affinity")
    assert hits["affinity"] == 1.0
    assert 0.1 < hits["random"] < 0.8


# ---- parts ----


def test_a_link_carries_one_copy_after_the_other():
    link = VirtualLink(Link(0.5, 100.0))
    assert link.carry(100.0, 10.0) == 11.5
    assert link.carry(50.0, 10.2) == 12.5
    assert link.carry(50.0, 20.0) == 21.0
    assert link.num_bytes == 200.0
    with pytest.raises(ValueError, match="no such link"):
        VirtualLink(None).carry(1.0, 0.0)


@given(mask=st.integers(0, 2**70))
def test_first_pages_end_at_the_first_gap(mask):
    text = bin(mask)[:1:-1].replace("b", "") + "0"
    assert first_pages(mask) == text.index("0")


def test_pages_behind_a_gap_are_not_reused():
    of = system()
    placement = Placement(of.placement, host_bytes=of.host_bytes, disk_bytes=0)
    store = SimulatedStore(of, placement)
    pages = store.index.find(0)
    pages.num_tokens, pages.host = 17, 0b1101
    assert store.reusable(pages) == 0b1
    pages.disk = 0b0010
    assert store.reusable(pages) == 0b1111
    pages.num_tokens = 9
    assert store.reusable(pages) == 0b11


def window(**values) -> Window:
    num = len(next(iter(values.values())))
    results = Results(num)
    for name, column in values.items():
        for row, value in enumerate(column):
            results.columns[name][row] = value
    return Window(results, np.ones(num, bool))


def test_hit_rates_by_hand():
    of = window(
        device=[0, 0, 10, 0], host=[0, 20, 0, 0], disk=[0, 0, 0, 0],
        recomputed=[0, 20, 0, 30], new=[50, 5, 5, 5],
    )  # fmt: skip
    assert of.hit_rate() == pytest.approx((0.5 + 1 + 0) / 4)
    assert of.hit_rate(counts_first=False) == pytest.approx(1.5 / 3)
    assert of.hit_rate("host") == pytest.approx(0.5 / 4)
    assert of.hit_rate("device", counts_first=False) == pytest.approx(1 / 3)
    assert of.hit_rate(by="tokens", counts_first=False) == pytest.approx(30 / 80)
    assert of.hit_rate(by="tokens") == pytest.approx(30 / 130)
    assert of.prompt_tokens == 145


def test_times_by_hand():
    of = window(
        prefill_s=[1.0, 2.0, 3.0, 10.0], queue_s=[0.0, 0.0, 4.0, 0.0], new=[4] * 4
    )
    assert of.ttft(with_queue=False)["p50"] == 2.5
    assert of.ttft(with_queue=True)["mean"] == 5.0
    assert of.prefill_tokens_per_s == 1.0
    empty = Window(Results(1), np.zeros(1, bool))
    assert np.isnan(empty.ttft(with_queue=True)["p99"])
    assert empty.hit_rate() == 0.0


def test_warm_up_goes_by_start_and_windows_by_arrival():
    played = trace([(float(n), [(0.0, 4, 1)]) for n in range(10)])
    simulated = Watched(played, system()).run()
    assert simulated.measured(3, 4)["arrived_s"].tolist() == [3.0, 4.0, 5.0, 6.0]
    assert simulated.between(2.0, 4.0).num_turns == 2


# ---- bad input ----


@pytest.mark.parametrize(
    ("sessions", "named"),
    [
        ([(-1.0, [(0.0, 1, 1)])], "session 0 has a negative arrival"),
        ([(float("nan"), [(0.0, 1, 1)])], "session 0 has a negative arrival"),
        ([(float("inf"), [(0.0, 1, 1)])], "session 0 has an endless arrival"),
        (
            [(5.0, [(0.0, 1, 1)]), (4.0, [(0.0, 1, 1)])],
            "session 1 has an arrival before",
        ),
        ([(0.0, [(0.0, 1, 1), (-2.0, 1, 1)])], "turn 1 has a negative think time"),
        ([(0.0, [(0.0, 1, 1), (float("inf"), 1, 1)])], "turn 1 has an endless think"),
        ([(0.0, [(0.0, 0, 1)])], "turn 0 has tokens below 1"),
        ([(0.0, [(0.0, 1, 0)])], "turn 0 has a reply below 1"),
    ],
)
def test_a_trace_that_cannot_be_is_refused_by_session_and_turn(sessions, named):
    with pytest.raises(ValueError, match=named):
        trace(sessions)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"device_pages": 3}, "one window takes 16"),
        ({"max_batch": 0}, "max_batch=0 must be at least 1"),
        ({"max_staged": -1}, "max_staged=-1 must be at least 0"),
        ({"host_pages": -1}, "must not be negative"),
        ({"overflow": "drop"}, "overflow='drop' is not one of keep, invalidate"),
        ({"truncation_ratio": 1.0}, "truncation_ratio=1.0"),
    ],
)
def test_a_system_that_cannot_be_is_refused_by_name_and_value(options, named):
    with pytest.raises(ValueError, match=named):
        system(**options)


def test_bad_replicas_are_refused():
    played = trace([(0.0, [(0.0, 1, 1)])])
    with pytest.raises(ValueError, match="num_replicas=0"):
        Simulation(played, system(), num_replicas=0)
    with pytest.raises((ValueError, TypeError), match="nearest"):
        Simulation(played, system(), routing="nearest")  # type: ignore
