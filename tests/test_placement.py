"""Who goes and who comes, against sorted lists and the examples of the paper."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachedattn_jax.store.placement.placement import Placement
from cachedattn_jax.store.placement.placement_config import PlacementConfig
from cachedattn_jax.store.placement.policies import POLICIES
from cachedattn_jax.store.placement.tier import Tier
from tests.naive_placement import NaivePlacement

LOOK_BACK = ("lru", "fifo", "fifo_by_age")
PLAIN = ("lookahead", "belady", *LOOK_BACK)


def names(standings) -> list:
    return [standing.session for standing in standings]


def placed(policy: str, *, host: int = 100, disk: int = 100, **config) -> Placement:
    config = {"host_reserve": 0.0, **config}
    settings_ = PlacementConfig(policy=policy, **config)
    return Placement(settings_, host_bytes=host, disk_bytes=disk)


def serve(
    placement: Placement,
    session,
    ticket: int,
    now: float,
    *,
    num_bytes: int = 1,
    tier: Tier = Tier.HOST,
    ends: bool = True,
    **ended,
) -> None:
    """One turn, at once, which leaves bytes in a tier."""
    placement.queued(session, ticket, now)
    placement.started(session, ticket, now)
    placement.resized(session, tier, num_bytes)
    if ends:
        ended = {"num_turns": 1, "num_tokens": 10, "kv_bytes": num_bytes, **ended}
        placement.ended(session, now, **ended)


def figure_9(policy: str = "lookahead") -> Placement:
    """Jobs 2 to 9 wait, job 1 runs; of four places in memory one is kept free."""
    placement = placed(policy, host=4, disk=4, host_reserve=0.25)
    for job in range(1, 10):
        tier = Tier.HOST if job in (1, 2, 4) else Tier.DISK
        serve(placement, job, job, now=float(job), tier=tier)
    for absent in (5, 6):
        placement.resized(absent, Tier.DISK, 0)
    for job in (3, 7, 8, 9):
        placement.on_disk_only(job, 1)
    for job in range(1, 10):
        placement.queued(job, 9 + job, now=20.0)
    placement.started(1, 10, 20.0)
    return placement


def test_the_example_of_the_paper_figure_9():
    placement = figure_9()
    # The prefetch window is 2: jobs 2 and 3, of which 3 is on disk.
    assert names(placement.to_fetch()) == [3]
    placement.on_disk_only(3, 0)
    placement.resized(3, Tier.HOST, 1)
    placement.resized(3, Tier.DISK, 0)
    # The buffer is full: of the eviction window of 6 the last in memory leaves, KV4.
    assert names(placement.victims(Tier.HOST, 20.0, spares_next=True)) == [4]
    assert names(placement.victims(Tier.HOST, 20.0)) == [4, 3, 2]
    # The disk is full: KV9 is dropped, the last to come of those outside of 2 to 7.
    assert names(placement.victims(Tier.DISK, 20.0)) == [9, 8]


def test_least_recently_used_would_do_otherwise_in_figure_9():
    placement = figure_9("lru")
    assert names(placement.victims(Tier.HOST, 20.0)) == [2, 4]
    assert names(placement.victims(Tier.DISK, 20.0)) == [3, 7, 8, 9]


def test_sessions_without_a_waiting_turn_go_before_those_that_have_one():
    placement = placed("lookahead")
    for session in range(6):
        serve(placement, session, session, now=float(session))
    for ticket, session in enumerate((3, 0, 5), start=10):
        placement.queued(session, ticket, now=10.0)
    assert names(placement.victims(Tier.HOST, 11.0)) == [1, 2, 4, 5, 0, 3]


def test_several_waiting_turns_of_a_session_count_by_the_first():
    placement = placed("lookahead")
    for session in "abc":
        serve(placement, session, ord(session), now=0.0)
    tickets = {"a": [201, 206], "b": [203, 204], "c": [202]}
    order = sorted((t, s) for s, all_ in tickets.items() for t in all_)
    for ticket, session in order:
        placement.queued(session, ticket, now=1.0)
    assert names(placement.victims(Tier.HOST, 2.0)) == ["b", "c", "a"]
    placement.unqueued("a", 201, 2.0)  # cancelled: its other turn is the last
    assert names(placement.victims(Tier.HOST, 2.0)) == ["a", "b", "c"]
    placement.unqueued("b", 204, 2.0)
    assert names(placement.victims(Tier.HOST, 2.0)) == ["a", "b", "c"]
    placement.unqueued("b", 203, 2.0)
    assert names(placement.victims(Tier.HOST, 2.0)) == ["b", "a", "c"]


def test_a_running_session_is_no_victim_and_its_next_turn_waits_with_it():
    placement = placed("lookahead")
    serve(placement, "a", 1, now=0.0, ends=False)
    placement.queued("a", 2, now=1.0)
    serve(placement, "b", 3, now=2.0)
    assert names(placement.victims(Tier.HOST, 3.0)) == ["b"]
    placement.ended("a", 4.0, num_turns=1, num_tokens=3, kv_bytes=1)
    assert names(placement.victims(Tier.HOST, 5.0)) == ["b", "a"]


def test_prefetch_can_be_switched_off_for_every_policy():
    for policy in POLICIES:
        for is_prefetching in (True, False):
            placement = placed(policy, is_prefetching=is_prefetching)
            serve(placement, "a", 1, now=0.0, tier=Tier.DISK)
            placement.on_disk_only("a", 1)
            placement.queued("a", 2, now=1.0)
            assert names(placement.to_fetch()) == ["a"] * is_prefetching


@pytest.mark.parametrize("policy", LOOK_BACK)
def test_policies_that_look_back_are_blind_to_the_queue(policy):
    placement = placed(policy)
    for session in range(5):
        serve(placement, session, session, now=float(session))
    before = names(placement.victims(Tier.HOST, 9.0))
    for ticket, session in enumerate((2, 0), start=10):
        placement.queued(session, ticket, now=9.0)
    assert names(placement.victims(Tier.HOST, 9.0)) == before == [0, 1, 2, 3, 4]


def test_fifo_goes_by_insertion_and_fifo_by_age_by_birth():
    for policy, expected in (("fifo", ["b", "c", "a"]), ("fifo_by_age", list("abc"))):
        placement = placed(policy)
        for ticket, session in enumerate("abc"):
            serve(placement, session, ticket, now=float(ticket))
        placement.resized("a", Tier.HOST, 0)
        placement.resized("a", Tier.HOST, 1)
        serve(placement, "b", 10, now=10.0, num_bytes=2)  # used again: no new insertion
        assert names(placement.victims(Tier.HOST, 11.0)) == expected


def test_belady_gives_up_who_comes_back_last_and_never_first():
    placement = placed("belady")
    for ticket, (session, at) in enumerate(
        {"a": 30.0, "b": None, "c": 90.0, "d": 40.0}.items()
    ):
        serve(placement, session, ticket, now=0.0, returns_at=at)
    placement.queued("c", 9, now=5.0)
    assert names(placement.victims(Tier.HOST, 6.0)) == ["b", "d", "a", "c"]


# ---- marks ----


@pytest.mark.parametrize("policy", POLICIES)
def test_closed_conversations_go_first_until_they_are_opened_again(policy):
    placement = placed(policy)
    for session in range(4):
        serve(placement, session, session, now=float(session))
    placement.closed(3)
    placement.closed("unknown")
    assert names(placement.victims(Tier.HOST, 9.0))[0] == 3
    serve(placement, 3, 10, now=10.0)
    assert names(placement.victims(Tier.HOST, 11.0))[-1] == 3 or "fifo" in policy


def test_a_turn_that_waits_when_its_conversation_is_closed_keeps_its_place():
    placement = placed("lookahead")
    for session in "ab":
        serve(placement, session, ord(session), now=0.0)
    placement.queued("b", 200, now=1.0)
    placement.closed("b")
    assert names(placement.victims(Tier.HOST, 2.0)) == ["a", "b"]
    placement.unqueued("b", 200, 3.0)
    assert names(placement.victims(Tier.HOST, 3.0)) == ["b", "a"]


@pytest.mark.parametrize("policy", POLICIES)
def test_pinned_pages_stay_below_the_device_and_leave_it_last(policy):
    placement = placed(policy)
    for tier in Tier:
        for session in "abc":
            serve(placement, session, ord(session) + 10 * len(tier), now=0.0, tier=tier)
    placement.pinned("a", True)
    for tier in (Tier.HOST, Tier.DISK):
        assert sorted(names(placement.victims(tier, 1.0))) == ["b", "c"]
    assert names(placement.victims(Tier.DEVICE, 1.0))[-1] == "a"
    placement.pinned("a", False)
    assert sorted(names(placement.victims(Tier.HOST, 1.0))) == ["a", "b", "c"]


def test_sessions_expire_after_their_time_and_are_told_once():
    placement = placed("lookahead", ttl_s=10.0)
    for session in range(3):
        serve(placement, session, session, now=float(session))
    assert names(placement.expired(9.9)) == []
    assert names(placement.expired(11.0)) == [0, 1]
    assert names(placement.expired(11.0)) == []
    placement.queued(2, 9, now=11.5)
    assert names(placement.expired(99.0)) == []
    placement.unqueued(2, 9, 100.0)  # cancelled: idle from now on
    assert names(placement.expired(109.0)) == []
    assert names(placement.expired(110.0)) == [2]


def test_a_pinned_session_expires_when_it_is_let_go():
    placement = placed("lookahead", ttl_s=10.0)
    for session in "ab":
        serve(placement, session, ord(session), now=0.0)
    placement.pinned("a", True)
    assert names(placement.expired(20.0)) == ["b"]
    placement.pinned("a", False)
    assert names(placement.expired(20.0)) == ["a"]


def test_the_time_of_a_session_from_before_a_restart_goes_on():
    placement = placed("lookahead", ttl_s=10.0)
    serve(placement, "new", 1, now=100.0)
    for session, used_at in (("late", 98.0), ("early", 95.0)):
        placement.known(session, "")
        placement.resized(session, Tier.DISK, 1)
        placement.recalled(session, used_at)
    assert names(placement.expired(105.0)) == ["early"]
    assert names(placement.expired(109.0)) == ["late"]
    placement.recalled("new", 0.0)  # it has had a turn since
    assert names(placement.expired(109.9)) == []
    assert names(placement.expired(110.0)) == ["new"]


def test_a_session_that_is_let_go_before_its_time_holds_up_no_other():
    placement = placed("lookahead", ttl_s=10.0)
    serve(placement, "early", 1, now=0.0)
    serve(placement, "late", 2, now=5.0)
    placement.pinned("late", True)
    placement.pinned("late", False)
    assert names(placement.expired(10.0)) == ["early"]


def test_a_tenant_over_its_quota_gives_up_its_own_closed_ones_first():
    placement = placed("lru", quotas={"small": 3})
    for ticket, session in enumerate("abcde"):
        placement.queued(session, ticket, 0.0, "big" if session == "a" else "small")
        placement.started(session, ticket, 0.0)
        placement.resized(session, Tier.HOST, 1)
        placement.ended(session, float(ticket), num_turns=1, num_tokens=1, kv_bytes=1)
    placement.closed("d")
    gave = []
    assert names(placement.victims(Tier.HOST, 9.0)) == ["d", "b", "c", "e", "a"]
    for standing, tier, at_most in placement.over_quota(9.0):
        gave.append((standing.session, tier, at_most))
        placement.resized(standing.session, tier, 0)
    assert gave == [("d", Tier.HOST, 1)]
    assert names(placement.victims(Tier.HOST, 9.0)) == ["a", "b", "c", "e"]


def test_a_session_pinned_before_its_first_turn_belongs_to_its_tenant():
    placement = placed("lru", quotas={"small": 0})
    placement.pinned("a", True, "small")
    placement.queued("a", 1, 0.0, "small")
    placement.resized("a", Tier.HOST, 5)
    placement.pinned("a", False)
    assert [entry[0].session for entry in placement.over_quota(1.0)] == ["a"]


def test_a_forgotten_session_is_gone_unless_something_of_it_is_stored():
    placement = placed("lru")
    serve(placement, "a", 1, now=0.0)
    placement.forgot("a")
    assert "a" in placement.standings
    placement.resized("a", Tier.HOST, 0)
    placement.forgot("a")
    assert not placement.standings


# ---- predictive ----


def returning(
    placement: Placement, rng, think_s: dict[str, float], rounds: int
) -> float:
    """Conversations of two tenants that come back after their think times."""
    now, ticket = 0.0, 0
    for number in range(rounds):
        for tenant, mean in think_s.items():
            session = f"{tenant}{number}"
            for turn in (1, 2):
                ticket += 1
                placement.queued(session, ticket, now, tenant)
                placement.started(session, ticket, now)
                placement.resized(session, Tier.HOST, 1)
                placement.ended(session, now, num_turns=turn, num_tokens=9, kv_bytes=1)
                now += mean * rng.uniform(0.8, 1.2) if turn == 1 else 0.0
            placement.resized(session, Tier.HOST, 0)
    return now


def test_predictive_learns_who_comes_back_soon():
    rng = np.random.default_rng(0)
    placement = placed("predictive", host=10**6, disk=0, token_weight=0.0)
    now = returning(placement, rng, {"fast": 5.0, "slow": 5000.0}, 300)
    for ticket, tenant in enumerate(("slow", "fast", "slow", "fast"), start=10**6):
        session = f"{tenant}-{ticket}"
        placement.queued(session, ticket, now, tenant)
        placement.started(session, ticket, now)
        placement.resized(session, Tier.HOST, 1)
        placement.ended(session, now, num_turns=1, num_tokens=9, kv_bytes=1)
    order = names(placement.victims(Tier.HOST, now + 1.0))
    assert [str(name)[:4] for name in order] == ["slow", "slow", "fast", "fast"]
    # Who did not come back when all of its kind do will hardly come any more.
    serve(placement, "other", 10**7, now=now + 99.0, tier=Tier.DISK)
    late = names(placement.victims(Tier.HOST, now + 100.0))
    assert [str(name)[:4] for name in late] == ["fast", "fast", "slow", "slow"]


def test_predictive_is_never_blind_to_the_queue():
    placement = placed("predictive")
    for session in range(6):
        serve(placement, session, session, now=float(session))
    placement.queued(4, 10, now=6.0)
    placement.queued(1, 11, now=6.0)
    order = names(placement.victims(Tier.HOST, 7.0))
    assert order[-2:] == [1, 4]
    assert sorted(order) == list(range(6))


# ---- against the naive model ----

SESSIONS = "abcdef"
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "queue",
                "cancel",
                "start",
                "end",
                "resize",
                "disk",
                "close",
                "pin",
                "wait",
            ]
        ),
        st.sampled_from(SESSIONS),
        st.integers(0, 9),
    ),
    max_size=60,
)


class Pair:
    """A placement and its naive double, told the same."""

    def __init__(self, policy: str, **limits) -> None:
        self.now, self.ticket = 0.0, 0
        self.naive = NaivePlacement(policy, host=20, disk=20, reserve=0.1, **limits)
        self.real = placed(
            policy,
            host=20,
            disk=20,
            host_reserve=0.1,
            ttl_s=limits.get("ttl"),
            quotas=limits.get("quotas", {}),
        )

    def tenant(self, name: str) -> str:
        return "small" if name in "ab" else "big"

    def do(self, what: str, name: str, number: int) -> None:
        self.now += 1.0
        one = (
            self.naive.see(name, self.tenant(name))
            if name in self.naive.known
            else None
        )
        tiers = list(Tier)
        match what:
            case "queue":
                self.queue(name)
            case "cancel" if one and one.tickets:
                ticket = one.tickets[number % len(one.tickets)]
                self.real.unqueued(name, ticket, self.now)
                self.leave(name, ticket)
            case "start" if one and one.tickets and not one.running:
                ticket = one.tickets[0]
                self.real.started(name, ticket, self.now)
                self.leave(name, ticket)
                self.naive.change(name, "", lambda o: setattr(o, "running", 1))
                one.used, one.idle_since = self.now, None
            case "end" if one and one.running:
                self.end(name, number)
            case "resize" if one:
                self.real.resized(name, tiers[number % 3], number // 3)
                self.naive.resize(name, tiers[number % 3], number // 3)
            case "disk" if one:
                self.real.on_disk_only(name, number // 5)
                one.disk_only = number // 5
            case "close" if one:
                self.real.closed(name)
                self.naive.change(name, "", lambda o: setattr(o, "closed", True))
            case "pin" if one:
                self.real.pinned(name, number > 5)
                self.naive.change(name, "", lambda o: setattr(o, "pinned", number > 5))

    def queue(self, name: str) -> None:
        self.ticket += 1
        self.real.queued(name, self.ticket, self.now, self.tenant(name))

        def wait(one) -> None:
            one.tickets.append(self.ticket)
            one.idle_since = None

        # Opened again first, then queued, as two steps.
        self.naive.change(
            name, self.tenant(name), lambda o: setattr(o, "closed", False)
        )
        self.naive.change(name, "", wait)
        self.naive.queue[self.ticket] = self.naive.known[name]

    def leave(self, name: str, ticket: int) -> None:
        one = self.naive.known[name]
        # A policy that looks ahead sees the session idle between two waiting turns.
        self.naive.change(name, "", lambda o: o.tickets.remove(ticket))
        if not one.tickets and not one.running:
            one.idle_since = self.now
        del self.naive.queue[ticket]

    def end(self, name: str, number: int) -> None:
        one = self.naive.known[name]
        one.turns += 1
        one.kv = number
        one.returns = self.now + number if number % 2 else None
        self.real.ended(
            name,
            self.now,
            num_turns=one.turns,
            num_tokens=number,
            kv_bytes=number,
            returns_at=one.returns,
        )
        self.naive.change(name, "", lambda o: setattr(o, "running", 0))
        if not one.tickets:
            one.idle_since = self.now

    def compare(self) -> None:
        for tier in Tier:
            for spares_next in (False, True):
                found = names(
                    self.real.victims(tier, self.now, spares_next=spares_next)
                )
                assert len(set(found)) == len(found)
                assert found == self.naive.victims(tier, spares_next)
        assert names(self.real.to_fetch()) == self.naive.to_fetch()


@pytest.mark.parametrize("policy", PLAIN)
@given(operations=OPERATIONS)
@settings(max_examples=80, deadline=None)
def test_victims_and_fetches_are_those_of_the_naive_model(policy, operations):
    pair = Pair(policy)
    for operation in operations:
        pair.do(*operation)
        pair.compare()


@pytest.mark.parametrize("policy", PLAIN)
@given(operations=OPERATIONS)
@settings(max_examples=40, deadline=None)
def test_quotas_are_those_of_the_naive_model(policy, operations):
    pair = Pair(policy, quotas={"small": 2})
    for operation in operations:
        pair.do(*operation)
        pair.compare()
    for standing, tier, at_most in pair.real.over_quota(pair.now):
        assert at_most == pair.naive.excess("small") > 0
        assert standing.tenant == "small"
        assert not (standing.is_pinned or standing.num_running)
        pair.real.resized(standing.session, tier, 0)
        pair.naive.resize(str(standing.session), tier, 0)
    if "small" in {o.tenant for o in pair.naive.known.values()}:
        kept = [o for o in pair.naive.known.values() if o.tenant == "small"]
        if not any(o.pinned or o.running for o in kept):
            assert pair.naive.excess("small") <= 0


@given(operations=OPERATIONS, policy=st.sampled_from(sorted(POLICIES)))
@settings(max_examples=80, deadline=None)
def test_sessions_expire_when_the_naive_model_says_so(operations, policy):
    pair = Pair("lru", ttl=7.0)
    pair.real = placed(policy, host=20, disk=20, ttl_s=7.0)
    for operation in operations:
        pair.do(*operation)
        expected = pair.naive.expired(pair.now)
        gone = [str(s.session) for s in pair.real.expired(pair.now)]
        assert sorted(gone) == expected
        for name in gone:
            pair.naive.known[name].idle_since = None
            for tier in Tier:
                pair.real.resized(name, tier, 0)
                pair.naive.resize(name, tier, 0)


@given(operations=OPERATIONS)
@settings(max_examples=80, deadline=None)
def test_predictive_gives_every_idle_session_once_and_the_queue_in_its_order(
    operations,
):
    pair, twin = Pair("lookahead"), Pair("lookahead")
    pair.real = placed("predictive", host=20, disk=20, host_reserve=0.1)
    twin.real = placed("predictive", host=20, disk=20, host_reserve=0.1)
    for operation in operations:
        pair.do(*operation)
        twin.do(*operation)
        for tier in Tier:
            found = names(pair.real.victims(tier, pair.now))
            expected = pair.naive.victims(tier)
            assert sorted(found) == sorted(expected)
            known = pair.naive.known
            assert [n for n in found if known[n].tickets] == [
                n for n in expected if known[n].tickets
            ]
            closed = [n for n in expected if known[n].rank(True) == "closed"]
            assert found[: len(closed)] == closed
            # The same questions at the same times get the same answers.
            assert names(twin.real.victims(tier, pair.now)) == found
        assert names(pair.real.to_fetch()) == pair.naive.to_fetch()


@pytest.mark.parametrize("policy", POLICIES)
def test_an_iteration_that_is_broken_off_changes_no_later_answer(policy):
    rng = np.random.default_rng(1)
    placement = placed(policy)
    for session in range(30):
        serve(
            placement,
            session,
            session,
            now=float(session),
            num_turns=int(rng.integers(1, 9)),
        )
    whole = names(placement.victims(Tier.HOST, 40.0))
    for number in (1, 5, 29):
        part = itertools.islice(placement.victims(Tier.HOST, 40.0), number)
        assert names(part) == whole[:number]
    assert names(placement.victims(Tier.HOST, 40.0)) == whole


def test_mean_sizes_follow_what_is_stored():
    """The window counts sessions of mean size: those below the device, no others."""
    placement = placed("lookahead", host=12, disk=0)
    for ticket, (session, size) in enumerate({"a": 2, "b": 6, "c": 100}.items()):
        tier = Tier.DEVICE if session == "c" else Tier.HOST
        serve(placement, session, ticket, now=0.0, num_bytes=size, tier=tier)
        placement.queued(session, 10 + ticket, now=1.0)
    assert names(placement.victims(Tier.HOST, 2.0, spares_next=True)) == []
    placement.resized("c", Tier.HOST, 100)
    assert names(placement.victims(Tier.HOST, 2.0, spares_next=True)) == ["c", "b", "a"]


def test_limits_of_the_configuration_are_named():
    for wrong, named in (
        ({"host_reserve": 1.5}, "host_reserve=1.5"),
        ({"ttl_s": 0.0}, "ttl_s=0.0"),
        ({"ttl_s": math.inf}, "ttl_s=inf"),
        ({"quotas": {"a": -1}}, "quota -1 of 'a'"),
        ({"granularity": "bytes"}, "granularity='bytes'"),
    ):
        with pytest.raises(ValueError, match=named):
            PlacementConfig(**wrong)  # type: ignore
    with pytest.raises(ValueError, match="did you mean 'lru'"):
        PlacementConfig(policy="lur")
