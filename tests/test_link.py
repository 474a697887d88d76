"""When copies over links count as done; an emulated link is never early."""

import time
from concurrent.futures import Future

import pytest

from cachedattn_jax.store.link import EmulatedLink, Link

SLOW = EmulatedLink(bytes_per_s=1000.0, latency_s=0.01)


def ended(at_s: float | None = None) -> "Future[float]":
    future: Future[float] = Future()
    future.set_result(time.monotonic() if at_s is None else at_s)
    return future


def test_a_real_copy_has_arrived_when_its_bytes_have():
    done: Future[float] = Future()
    copy = Link().carry(100, done)
    assert not copy.has_arrived and not copy.wait(0.001)
    done.set_result(time.monotonic())
    assert copy.has_arrived and copy.has_ended and not copy.has_failed
    start_s, end_s = copy.span
    assert start_s <= end_s == done.result()


def test_an_emulated_copy_takes_its_latency_and_its_bytes():
    started_s = time.monotonic()
    copy = Link(SLOW).carry(20, ended())
    assert not copy.has_arrived
    assert copy.wait()
    assert time.monotonic() - started_s >= 0.03
    start_s, end_s = copy.span
    assert end_s - start_s == pytest.approx(0.03)


def test_copies_follow_each_other_and_overlap_only_in_their_latency():
    link = Link(SLOW)
    copies = [link.carry(10, ended()) for _ in range(4)]
    spans = [copy.span for copy in copies]
    for (before, _), (start, end) in zip(spans, spans[1:], strict=False):
        assert start == pytest.approx(before + 0.01)
        assert end - start == pytest.approx(0.02)


def test_a_copy_does_not_start_before_its_bytes_are_there():
    there: Future[float] = Future()
    copy = Link(SLOW).carry(1, ended(), there)
    assert not copy.wait(0.03)
    moment_s = time.monotonic()
    there.set_result(moment_s)
    assert copy.wait()
    assert copy.span[0] == moment_s


def test_the_last_of_many_waiting_copies_can_be_waited_for():
    link, there = Link(EmulatedLink(bytes_per_s=1e6)), ended()
    open_one: Future[float] = Future()
    first = link.carry(1, ended(), open_one)
    last = [link.carry(1, ended(), there) for _ in range(3000)][-1]
    assert not last.has_arrived
    open_one.set_result(time.monotonic())
    assert last.wait() and first.has_arrived


def test_a_copy_whose_program_failed_has_ended_and_says_why():
    done: Future[float] = Future()
    done.set_exception(RuntimeError("out of memory"))
    for link in (Link(), Link(SLOW)):
        copy = link.carry(5, done)
        assert copy.has_failed and copy.has_ended
        with pytest.raises(RuntimeError, match="out of memory"):
            _ = copy.span
        after = link.carry(5, ended())
        assert after.wait() and after.has_arrived


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bytes_per_s": 0}, "bytes_per_s=0 must be at least 1"),
        ({"bytes_per_s": "fast"}, "bytes_per_s='fast'"),
        ({"bytes_per_s": 1e9, "latency_s": -1}, "latency_s=-1 must be at least 0"),
    ],
)
def test_a_link_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        EmulatedLink(**fields)
