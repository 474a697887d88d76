"""What was measured: how it is written down, and what is refused."""

import json
import math
import time
from concurrent.futures import Future
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachedattn_jax.engine.calibrate import _flow, _line, _quickest
from cachedattn_jax.engine.cost_constants import Constants, Link
from cachedattn_jax.store.link import Copy
from tests.costs import CONSTANT_SETS, CONSTANTS


@given(CONSTANT_SETS, st.booleans())
def test_a_description_comes_back_from_json(constants, has_disk):
    if not has_disk:
        constants = replace(constants, disk_read=None, disk_write=None)
    description = constants.describe()
    assert Constants.from_description(description) == constants
    written = json.loads(json.dumps(description, allow_nan=False))
    assert written == description
    assert Constants.from_description(written) == constants


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefill": {"16": {"base_s": 1.0}}}, "s_per_context_token"),
        ({"prefill": {"many": {}}}, "many"),
        ({"prefill": 3}, "int"),
        ({"host_to_device": {"latency_s": 0.0, "bytes_per_s": 0.0}}, "above 0"),
        ({"host_to_device": None}, "only a disk"),
        ({"disk_read": {"latency_s": -1.0, "bytes_per_s": 1.0}}, "latency_s=-1.0"),
        ({"decode_step_s": math.nan}, "decode_step_s=nan"),
        ({"tape_read": None}, "tape_read"),
    ],
)
def test_a_wrong_description_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Constants.from_description({**CONSTANTS.describe(), **change})


@pytest.mark.parametrize("missing", list(CONSTANTS.describe()))
def test_a_missing_part_of_a_description_is_named(missing):
    description = CONSTANTS.describe()
    del description[missing]
    with pytest.raises(ValueError, match=missing):
        Constants.from_description(description)


def test_a_copy_takes_its_latency_and_its_bytes_and_nothing_takes_none():
    assert Link(0.5, 100.0).seconds(200) == 2.5
    assert Link(0.5, 100.0).seconds(0) == 0.0


def test_a_small_copy_that_was_held_up_leaves_a_link_that_can_be_used():
    link = _line([(100, 2.0), (1000, 1.0)])
    assert link == Link(0.0, 1000.0)
    usual = _line([(100, 1.0), (1000, 1.9)])
    assert (usual.latency_s, usual.bytes_per_s) == pytest.approx((0.9, 1000.0))


def copy_of(num_bytes, seconds):
    """A real copy that ended so long after its link was told of it, or before."""
    done: Future[float] = Future()
    copy = Copy(num_bytes, done, None, None, None)
    done.set_result(time.monotonic() + seconds)
    return copy


def test_copies_that_ended_before_they_were_seen_say_nothing_of_a_link():
    few = [copy_of(100, seconds) for seconds in (-1, 3, -1, 2)]
    many = [copy_of(1000, seconds) for seconds in (5, -1, -1, 4)]
    link = _line([_quickest(few), _quickest(many)])
    assert link.bytes_per_s == pytest.approx(450, rel=0.1)
    assert link.latency_s == pytest.approx(2 - 100 / 450, rel=0.1)
    assert _flow(many).bytes_per_s == pytest.approx(4000 / 5, rel=0.1)


@pytest.mark.parametrize("many_s", [-1, 2])
@pytest.mark.parametrize("few_s", [-1, 2])
def test_a_link_on_which_no_copy_was_seen_can_be_used(few_s, many_s):
    few, many = [copy_of(100, few_s)] * 3, [copy_of(1000, many_s)] * 3
    link = _line([_quickest(few), _quickest(many)])
    assert 0 <= link.latency_s <= 2.1 and link.bytes_per_s >= 400
    assert _flow([copy_of(100, -1)] * 3).bytes_per_s > 1e6
