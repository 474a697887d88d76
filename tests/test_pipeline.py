"""The schedule of a layer-wise prefill, against a search and a simulation."""

import heapq
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachedattn_jax.engine.pipeline import (
    equal_groups_finish_s,
    exposed_stall_s,
    least_finish_s,
    no_preload_s,
    read_buffer_groups,
    schedule,
)

SECONDS = st.floats(0.0, 10.0, allow_subnormal=False)
GROUPS = st.lists(st.tuples(SECONDS, SECONDS), min_size=1, max_size=12)
READ_AHEAD = st.integers(0, 14)
LEAD = st.floats(0.0, 50.0) | st.just(math.inf)


def split(groups):
    return [load for load, _ in groups], [compute for _, compute in groups]


def search(load, compute, ahead, lead):
    """The least finish over all schedules with integer starts that keep the rules."""
    num_groups, window = len(load), max(1, ahead)
    lead = int(min(lead, sum(load)))
    best = sum(load) + sum(compute) + 1

    def place(group, load_starts, compute_starts):
        nonlocal best
        if group == num_groups:
            best = min(best, compute_starts[-1] + compute[-1])
            return
        first = -lead if group < ahead else 0
        if group:
            first = max(first, load_starts[-1] + load[group - 1])
        if group >= window:
            first = max(first, compute_starts[group - window])
        for load_start in range(first, best):
            ready = max(0, load_start + load[group])
            if group:
                ready = max(ready, compute_starts[-1] + compute[group - 1])
            if ready + sum(compute[group:]) >= best:
                break
            for start in range(ready, best):
                # No schedule with this start or a later one can beat the best.
                if start + sum(compute[group:]) >= best:
                    break
                place(group + 1, [*load_starts, load_start], [*compute_starts, start])

    place(0, [], [])
    return best


def simulate(load, compute, ahead, lead):
    """Lets a link and a device take work off counters, event by event."""
    num_groups = len(load)
    now, waiting, arrived, done, started = 0.0, list(range(num_groups)), 0, 0, 0
    events, link_busy, device_busy = [], False, False
    budget = lead
    while waiting and waiting[0] < ahead and budget >= load[waiting[0]]:
        budget -= load[waiting.pop(0)]
        arrived += 1
    if waiting and waiting[0] < ahead and budget > 0:
        heapq.heappush(events, (load[waiting.pop(0)] - budget, "copied"))
        link_busy = True
    while done < num_groups:
        progress = True
        while progress:
            progress = False
            if not device_busy and started < arrived:
                heapq.heappush(events, (now + compute[started], "computed"))
                started, device_busy, progress = started + 1, True, True
            # In flight or in the buffer: sent but not started. Group 0 needs no room.
            sent = num_groups - len(waiting)
            if (
                waiting
                and not link_busy
                and (sent - started < ahead or sent <= started)
            ):
                # Without a buffer the next group is sent when the device has begun.
                heapq.heappush(events, (now + load[waiting.pop(0)], "copied"))
                link_busy = progress = True
        now, what = heapq.heappop(events)
        if what == "copied":
            arrived, link_busy = arrived + 1, False
        else:
            done, device_busy = done + 1, False
    return now


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=4),
    st.integers(0, 5),
    st.integers(0, 6) | st.just(math.inf),
)
def test_no_schedule_that_keeps_the_rules_ends_earlier(groups, ahead, lead):
    load, compute = split(groups)
    found = least_finish_s(
        [float(s) for s in load],
        [float(s) for s in compute],
        read_ahead=ahead,
        lead_s=float(lead),
    )
    assert found == search(load, compute, ahead, lead)


@given(GROUPS, READ_AHEAD, LEAD)
def test_a_simulation_of_events_ends_at_the_same_time(groups, ahead, lead):
    load, compute = split(groups)
    found = least_finish_s(load, compute, read_ahead=ahead, lead_s=lead)
    assert found == pytest.approx(simulate(load, compute, ahead, lead), abs=1e-9)


@given(GROUPS, READ_AHEAD, LEAD)
def test_a_schedule_keeps_its_own_rules(groups, ahead, lead):
    load, compute = split(groups)
    slots = schedule(load, compute, read_ahead=ahead, lead_s=lead)
    for group, slot in enumerate(slots):
        assert slot.load_end_s == slot.load_start_s + load[group]
        assert slot.compute_end_s == slot.compute_start_s + compute[group]
        assert slot.compute_start_s >= max(0.0, slot.load_end_s)
        assert slot.load_start_s >= (-lead if group < ahead else 0.0) - 1e-9
        if group:
            assert slot.load_start_s >= slots[group - 1].load_end_s
            assert slot.compute_start_s >= slots[group - 1].compute_end_s
        if group >= max(1, ahead):
            allowed = slots[group - max(1, ahead)].compute_start_s
            assert slot.load_start_s >= allowed


@given(GROUPS, READ_AHEAD, LEAD, st.floats(0.0, 5.0), st.data())
def test_more_buffer_or_lead_never_delays_and_more_load_never_hastens(
    groups, ahead, lead, more, data
):
    load, compute = split(groups)
    finish = least_finish_s(load, compute, read_ahead=ahead, lead_s=lead)
    buffered = least_finish_s(load, compute, read_ahead=ahead + 1, lead_s=lead)
    assert buffered <= finish + 1e-9
    led = least_finish_s(load, compute, read_ahead=ahead, lead_s=lead + more)
    assert led <= finish + 1e-9
    load[data.draw(st.integers(0, len(load) - 1))] += more
    loaded = least_finish_s(load, compute, read_ahead=ahead, lead_s=lead)
    assert loaded >= finish - 1e-9


@given(GROUPS, READ_AHEAD, LEAD)
def test_the_finish_lies_between_its_bounds(groups, ahead, lead):
    load, compute = split(groups)
    finish = least_finish_s(load, compute, read_ahead=ahead, lead_s=lead)
    before = min(lead, sum(load[:ahead]))
    least = max(sum(compute), sum(load) - before + compute[-1])
    assert least - 1e-9 <= finish <= no_preload_s(load, compute) + 1e-9


@given(GROUPS, READ_AHEAD, LEAD)
def test_the_finish_is_the_computes_and_the_exposed_stalls(groups, ahead, lead):
    load, compute = split(groups)
    slots = schedule(load, compute, read_ahead=ahead, lead_s=lead)
    stall = exposed_stall_s(
        [slot.load_end_s for slot in slots], [slot.compute_end_s for slot in slots], 0.0
    )
    assert slots[-1].compute_end_s == pytest.approx(sum(compute) + stall, abs=1e-9)


def test_a_stall_is_counted_from_the_start_and_from_the_compute_before():
    # Waits 2 s for the first copy, none for the second, 3 s for the third.
    assert exposed_stall_s([12.0, 13.0, 20.0], [15.0, 17.0, 21.0], 10.0) == 5.0
    assert exposed_stall_s([], [], 10.0) == 0.0
    with pytest.raises(ValueError, match="1 arrivals do not go with 2"):
        exposed_stall_s([1.0], [1.0, 2.0], 0.0)


@given(
    st.lists(st.tuples(SECONDS, SECONDS), min_size=1, max_size=5),
    st.integers(1, 45),
    st.integers(0, 50),
    LEAD,
)
def test_the_closed_form_of_equal_groups_is_exact(cases, num_groups, ahead, lead):
    load, compute = (np.asarray(seconds) for seconds in split(cases))
    found = equal_groups_finish_s(
        load, compute, num_groups=num_groups, read_ahead=ahead, lead_s=lead
    )
    wanted = [
        least_finish_s(
            [a] * num_groups, [b] * num_groups, read_ahead=ahead, lead_s=lead
        )
        for a, b in cases
    ]
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-9)


@given(SECONDS, SECONDS, st.integers(1, 100))
def test_the_read_buffer_hides_all_loads_and_one_group_less_does_not(
    load, compute, num_groups
):
    groups = read_buffer_groups(load, compute, num_groups)
    assert 1 <= groups <= num_groups
    loads, computes = [load] * num_groups, [compute] * num_groups
    assert least_finish_s(loads, computes, read_ahead=groups) <= sum(computes) + 1e-9
    if groups > 1:
        fewer = least_finish_s(loads, computes, read_ahead=groups - 1)
        assert fewer > sum(computes)


@given(st.floats(1e-3, 10.0), SECONDS, st.integers(1, 100))
def test_the_read_buffer_is_the_papers_or_one_group_more(load, compute, num_groups):
    groups = read_buffer_groups(load, compute, num_groups)
    paper = math.ceil(num_groups * (load - compute) / load - 1e-9)
    paper = min(max(1, paper), num_groups)
    assert groups - paper in (0, 1)


def test_the_papers_buffer_can_be_one_group_short():
    # 4 groups of 2 s to load, 1 s to compute: the paper's 2 groups leave 1 s to wait.
    loads, computes = [2.0] * 4, [1.0] * 4
    assert read_buffer_groups(2.0, 1.0, 4) == 3
    assert least_finish_s(loads, computes, read_ahead=3) == 4.0
    assert least_finish_s(loads, computes, read_ahead=2) == 5.0


def test_figure_19_of_the_paper_is_met_within_a_tenth():
    """LLaMA-13B, 40 layers, 1000 tokens of history and 100 new ones, batch of 16."""
    loads, computes = [0.543 / 40] * 40, [0.37 / 40] * 40
    assert no_preload_s(loads, computes) == pytest.approx(0.913)
    read = {0: 0.60, 5: 0.52, 10: 0.41, 15: 0.36}
    found = {
        layers: least_finish_s(loads, computes, read_ahead=layers) for layers in read
    }
    assert found == pytest.approx(read, rel=0.1)
    # The paper calls 15 layers a perfect overlap; 14 are enough, by its formula 13.
    assert found[15] == pytest.approx(0.37)
    assert read_buffer_groups(loads[0], computes[0], 40) == 14
    assert found[0] == pytest.approx(0.543 + 0.37 / 40)


@pytest.mark.parametrize(
    ("loads", "computes", "ahead", "lead"),
    [
        ([1.0], [1.0, 2.0], 1, 0.0),
        ([-1.0], [1.0], 1, 0.0),
        ([math.inf], [1.0], 1, 0.0),
        ([1.0], [math.nan], 1, 0.0),
        ([1.0], [1.0], -1, 0.0),
        ([1.0], [1.0], 1, -1.0),
        ([1.0], [1.0], 1, math.nan),
    ],
)
def test_what_is_no_time_is_refused(loads, computes, ahead, lead):
    with pytest.raises(ValueError, match="must|do not go"):
        least_finish_s(loads, computes, read_ahead=ahead, lead_s=lead)


def test_no_groups_take_no_time_but_need_no_buffer():
    assert least_finish_s([], [], read_ahead=2) == 0.0
    assert no_preload_s([], []) == 0.0
    with pytest.raises(ValueError, match="at least 1"):
        read_buffer_groups(1.0, 1.0, 0)
