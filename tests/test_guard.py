"""Operations end in time, breakers open and heal, faults look like the real ones."""

import time

import pytest
import tensorstore as ts

from cachedattn_jax.store.objects.breaker import Breaker
from cachedattn_jax.store.objects.fault_config import FAULTS, FaultConfig
from cachedattn_jax.store.objects.faults import Faults, FaultyKv
from cachedattn_jax.store.objects.guard import Guard, StorageFailure
from cachedattn_jax.store.objects.object_kv import ObjectKv


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_a_breaker_opens_after_failures_in_a_row_and_tries_again_after_a_rest():
    clock = Clock()
    breaker = Breaker(3, 10.0, clock)
    for failure in (True, True, False, True, True):
        breaker.failed() if failure else breaker.succeeded()
    assert breaker.state == "closed"
    breaker.failed()
    assert breaker.state == "open" and breaker.is_open
    clock.now = 10.0
    assert breaker.state == "trying" and not breaker.is_open
    breaker.succeeded()
    assert breaker.state == "closed"


def test_every_failed_try_doubles_the_rest_up_to_a_limit():
    clock = Clock()
    breaker = Breaker(1, 1.0, clock)
    rests = []
    for _ in range(6):
        breaker.failed()
        start = clock.now
        while breaker.is_open:
            clock.now += 0.5
        rests.append(clock.now - start)
    assert rests == [1, 2, 4, 8, 8, 8]
    assert breaker.num_opened == 6


def test_failures_while_it_is_open_count_once():
    """Those under way when it opened end later, and say nothing new."""
    clock = Clock()
    breaker = Breaker(1, 1.0, clock)
    for _ in range(20):
        breaker.failed()
    assert breaker.num_opened == 1
    clock.now = 1.0
    assert not breaker.is_open


def guarded(rate, kinds, timeout_s=5.0, **options):
    context = ts.Context()
    raw = ts.KvStore.open("memory://", context=context).result()
    faults = Faults(FaultConfig(rate=rate, kinds=kinds, **options))
    breakers = {name: Breaker(3, 60.0) for name in ("reading", "writing")}
    faulty = FaultyKv(ObjectKv(raw), faults)
    return Guard(faulty, timeout_s=timeout_s, **breakers), faults, raw


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("error", "io_error"),
        ("permission", "permission"),
        ("disk_full", "disk_full"),
        ("hang", "timeout"),
    ],
)
def test_a_failed_write_says_why_and_is_counted(kind, reason):
    guard, faults, _ = guarded(1.0, [kind], timeout_s=0.05)
    with pytest.raises(StorageFailure, match=reason):
        guard.write("a", [b"1"]).result()
    assert guard.counters[f"write_failed_{reason}"] == faults.injected[kind] == 1


def test_a_hanging_store_costs_the_timeouts_until_the_breaker_opens_and_no_more():
    guard, faults, raw = guarded(1.0, ["hang"], timeout_s=0.05)
    raw.write("a", b"1").result()
    started_s = time.monotonic()
    reasons = []
    for _ in range(50):
        with pytest.raises(StorageFailure) as caught:
            guard.read("a").result()
        reasons.append(caught.value.reason)
    assert reasons == ["timeout"] * 3 + ["breaker_open"] * 47
    assert time.monotonic() - started_s < 5
    assert faults.injected["hang"] == 3


def test_a_store_that_heals_is_used_again():
    guard, faults, raw = guarded(1.0, ["error"])
    guard.reading = Breaker(3, 0.05)
    raw.write("a", b"1").result()
    for _ in range(3):
        with pytest.raises(StorageFailure):
            guard.read("a").result()
    assert guard.reading.is_open
    faults.heal()
    while guard.reading.is_open:
        pass
    assert guard.read("a").result().value == b"1"
    assert guard.reading.state == "closed"


def test_faults_are_the_same_for_the_same_seed():
    def struck(seed):
        faults = Faults(FaultConfig(rate=0.3, seed=seed))
        return [faults.draw_read() for _ in range(200)]

    assert struck(1) == struck(1) != struck(2)
    assert set(filter(None, struck(1))) <= set(FAULTS)


def test_a_torn_write_is_known_until_it_is_written_again():
    guard, faults, raw = guarded(1.0, ["torn_write"])
    guard.write("a", [b"0123456789"]).result()
    assert faults.torn == {"a"}
    assert len(raw.read("a").result().value) < 10
    faults.heal()
    guard.write("a", [b"0123456789"]).result()
    assert not faults.torn


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rate": 2}, "rate=2 must lie from 0 to 1"),
        ({"rate": 0.1, "kinds": ["bitflip"]}, "fault 'bitflip' is not one of"),
        ({"rate": 0.1, "hang_s": -1}, "hang_s=-1 must be seconds from 0"),
    ],
)
def test_bad_faults_are_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        FaultConfig(**options)
