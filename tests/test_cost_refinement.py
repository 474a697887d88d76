"""What a cost model learns from prefills and copies that happen."""

import math
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachedattn_jax.engine.cost_model import Link
from tests.costs import CONSTANTS, cost_model


def test_prefills_that_happen_correct_all_predictions_of_prefills():
    model = cost_model()
    before = model.prefill_s(300, 0)
    for _ in range(40):
        model.observe_prefill(100, 50, 3 * cost_model().prefill_s(100, 50))
    assert model.prefill_s(300, 0) == pytest.approx(3 * before, rel=0.01)
    refined = cost_model(model.constants)
    assert refined.prefill_s(300, 0) == pytest.approx(model.prefill_s(300, 0))


@given(st.floats(0.02, 50.0), st.floats(0.0, 1e-3), st.booleans())
def test_copies_that_happen_teach_the_true_bandwidth(factor, latency, is_disk):
    tier, name = ("disk", "disk_read") if is_disk else ("host", "host_to_device")
    true = Link(latency, factor * 1e9)
    model = cost_model(replace(CONSTANTS, **{name: Link(latency, 1e9)}))
    for num_bytes in [1 << 20, 1 << 24] * 40:
        model.observe_load(tier, num_bytes, true.seconds(num_bytes))
    learnt = getattr(model.constants, name)
    assert learnt.bytes_per_s == pytest.approx(true.bytes_per_s, rel=0.01)
    assert learnt.latency_s == latency


@given(st.sampled_from([1e-9, 0.01, 100.0, 1e9]), st.integers(0, 20))
def test_an_outlier_moves_no_estimate_twofold_and_is_forgotten(outlier, num_before):
    model = cost_model()
    prefill, load = model.prefill_s(300, 0), model.load_s(10, 0)
    num_bytes = 1 << 24
    copy_s = CONSTANTS.host_to_device.seconds(num_bytes)
    for _ in range(num_before):
        model.observe_prefill(300, 0, prefill)
        model.observe_load("host", num_bytes, copy_s)
    model.observe_prefill(300, 0, outlier * prefill)
    model.observe_load("host", num_bytes, outlier * copy_s)
    assert 0.5 < model.prefill_s(300, 0) / prefill < 2.0
    assert 0.5 < model.load_s(10, 0) / load < 2.0
    for _ in range(25):
        model.observe_prefill(300, 0, prefill)
        model.observe_load("host", num_bytes, copy_s)
    assert model.prefill_s(300, 0) == pytest.approx(prefill, rel=0.01)
    assert model.load_s(10, 0) == pytest.approx(load, rel=0.01)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_garbage_teaches_nothing(seconds):
    model = cost_model()
    model.observe_prefill(100, 0, seconds)
    model.observe_load("host", 1 << 24, seconds)
    model.observe_load("disk", 1 << 24, seconds)
    assert model.constants == CONSTANTS


def test_small_copies_and_empty_prefills_teach_nothing():
    model = cost_model()
    model.observe_load("host", 64 * 1024 - 1, 10.0)
    model.observe_prefill(0, 0, 10.0)
    assert model.constants == CONSTANTS
    model.observe_load("host", 64 * 1024, 10.0)
    assert model.constants != CONSTANTS
    no_disk = replace(CONSTANTS, disk_read=None)
    model = cost_model(no_disk)
    model.observe_load("disk", 1 << 24, 10.0)
    assert model.constants == no_disk


def test_a_link_that_only_seemed_slow_is_tried_again():
    model = cost_model()
    for _ in range(40):
        model.observe_load("host", 1 << 24, 1e3)
    turns = 0
    while model.decide(["host"] * 20, 400).choice == "recompute":
        model.observe_no_load()
        turns += 1
    assert 10 < turns < 200
    model.observe_load("host", 1 << 24, CONSTANTS.host_to_device.seconds(1 << 24))
    assert model.decide(["host"] * 20, 400).choice != "recompute"


def test_a_link_that_became_slow_is_seldom_tried_and_with_few_pages():
    model, choices = cost_model(), Counter()
    true_s = 2000 * CONSTANTS.host_to_device.seconds(1 << 24)
    for _ in range(500):
        choice = model.decide(["host"] * 20, 400).choice
        choices[choice] += 1
        if choice == "recompute":
            model.observe_no_load()
        else:
            model.observe_load("host", 1 << 24, true_s)
    assert 0 < choices["load"] < 10 < choices["load_prefix"] < 150


def test_copies_of_a_turn_that_overlap_count_as_one_observation():
    model = cost_model()
    link = CONSTANTS.host_to_device
    num_bytes, copies = 1 << 26, 8
    together_s = copies * link.latency_s + num_bytes / link.bytes_per_s
    model.observe_load("host", num_bytes, together_s, copies)
    learnt = model.constants
    assert learnt is not None
    assert learnt.host_to_device.bytes_per_s == pytest.approx(link.bytes_per_s)
