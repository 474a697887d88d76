"""A timeline can be read back, measured and drawn; mistakes are answered in words."""

import gzip
import json

import pytest
from typer.testing import CliRunner

from cachedattn_jax import gantt
from cachedattn_jax.cli import app
from cachedattn_jax.timeline import Timeline


def timeline() -> Timeline:
    """Two turns of four groups, the second one's loading the larger."""
    timeline = Timeline()
    for number, turn in enumerate(("alice#0", "bob#3")):
        start = 10.0 + number
        for group in range(4):
            details = {"turn": turn, "group": group}
            copy = start + 0.01 * group
            timeline.add(
                "put",
                "host to device",
                copy,
                copy + 0.01,
                bytes=1000 * (number + 1),
                **details,
            )
            timeline.add("prefill", "compute", copy + 0.01, copy + 0.02, **details)
        timeline.add("wait", "wait", start, start + 0.01, group=0, turn=turn)
    timeline.add("decode", "compute", 11.005, 11.011, batch=3)
    return timeline


@pytest.fixture
def run(tmp_path):
    with gzip.open(tmp_path / "timeline.json.gz", "wt") as file:
        json.dump(timeline().chrome_trace(), file)
    return tmp_path


def test_what_is_read_is_what_was_written(run):
    found = gantt.read_timeline(run / "timeline.json.gz")
    written = timeline().events
    origin = min(event.start_s for event in written)
    assert len(found) == len(written)
    for one, other in zip(found, written, strict=True):
        assert (one.name, one.track, one.details) == (
            other.name,
            other.track,
            other.details,
        )
        assert one.start_s == pytest.approx(other.start_s - origin)
        assert one.end_s == pytest.approx(other.end_s - origin)


def test_the_busiest_turn_moved_most_bytes_to_the_device():
    assert gantt.turns(timeline().events) == ["alice#0", "bob#3"]
    assert gantt.busiest_turn(timeline().events) == "bob#3"


def test_busy_time_counts_overlaps_once():
    events = Timeline()
    for start, end in ((0.0, 2.0), (1.0, 3.0), (5.0, 6.0), (5.2, 5.4)):
        events.add("put", "host to device", start, end, turn="a#0", bytes=5)
    (row,) = gantt.track_table(events.events, "a#0")
    assert (row.num_events, row.num_bytes) == (4, 20)
    assert row.busy_s == pytest.approx(4.0)


def test_the_picture_shows_groups_others_and_waits():
    figure = gantt.draw_turn(timeline().events, "bob#3")
    (axes,) = figure.axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["wait", "host to device", "compute"]
    shown = [text.get_text() for text in axes.texts]
    assert shown.count("0") == 3 and shown.count("3") == 2
    assert "bob#3" in axes.get_title(loc="left")
    assert "10.0 ms waited for" in axes.get_title(loc="left")
    # The decode step of others is there, and nothing of the turn a second before.
    spans = [c.get_paths()[0].get_extents() for c in axes.collections]
    assert min(span.x0 for span in spans) == pytest.approx(0.0, abs=0.1)
    assert len(axes.collections) == 4


def test_thousands_of_events_are_few_things_to_draw():
    events = timeline()
    for step in range(5000):
        start = 11.0 + step * 1e-6
        events.add("decode", "compute", start, start + 1e-6, batch=1)
    (axes,) = gantt.draw_turn(events.events, "bob#3").axes
    assert len(axes.collections) + len(axes.texts) < 50


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_command_draws_a_turn_and_says_where(run, suffix):
    output = run / f"picture.{suffix}"
    done = CliRunner().invoke(app, ["timeline", str(run), "--output", str(output)])
    assert done.exit_code == 0, done.output
    assert "bob#3" in done.output and "host to device" in done.output
    assert output.stat().st_size > 1000


def test_the_command_lists_turns(run):
    done = CliRunner().invoke(app, ["timeline", str(run), "--list"])
    assert done.output.split() == ["alice#0", "bob#3"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--turn", "bob#4"], "no turn 'bob#4'; nearest: bob#3"),
        (["--output", "picture.gif"], "picture.gif must end in .svg or .png"),
    ],
)
def test_a_mistake_gets_a_sentence(run, arguments, message):
    done = CliRunner().invoke(app, ["timeline", str(run), *arguments])
    assert done.exit_code == 2
    assert message in done.output


# Without a time in it, or two workers would collect tests of different names.
_NO_EVENTS = gzip.compress(b"{}", mtime=0)


@pytest.mark.parametrize("content", [None, b"", b"no gzip", _NO_EVENTS])
def test_a_file_that_is_no_timeline_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "timeline.json.gz").write_bytes(content)
    done = CliRunner().invoke(app, ["timeline", str(tmp_path)])
    assert done.exit_code == 2
    assert "timeline.json.gz" in done.output and "Traceback" not in done.output
