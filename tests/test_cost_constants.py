"""What was measured: how it is written down, and what is refused."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachedattn_jax.engine.calibrate import _line
from cachedattn_jax.engine.cost_constants import Constants, Link
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
