"""One turn as a picture: what was copied, computed and waited for, and when.

Knows events and their tracks. Does not know engines or run directories. Matplotlib is
imported only when something is drawn.
"""

from __future__ import annotations

import difflib
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cachedattn_jax.timeline import TRACKS, Event, busy_s

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OTHERS = "0.85"
_WAITS = "#d62728"
# A bar narrower than this share of the picture has no room for its number.
_LABEL_SHARE = 0.02


@dataclass(frozen=True, kw_only=True)
class TrackUse:
    """What one turn did on one track.

    Attributes:
        busy_s: seconds covered by its events, overlaps counted once.
    """

    track: str
    num_events: int
    busy_s: float
    num_bytes: int


def read_timeline(path: Path) -> list[Event]:
    """The events of a timeline.json.gz.

    Raises:
        ValueError: the file is missing, damaged or no timeline.
    """
    try:
        with gzip.open(path, "rt") as file:
            rows = json.load(file)["traceEvents"]
        tracks = {r["tid"]: r["args"]["name"] for r in rows if r["ph"] == "M"}
        return [
            Event(
                name=row["name"],
                track=tracks[row["tid"]],
                start_s=row["ts"] / 1e6,
                end_s=(row["ts"] + row["dur"]) / 1e6,
                details=row["args"],
            )
            for row in rows
            if row["ph"] == "X"
        ]
    except FileNotFoundError as error:
        raise ValueError(f"there is no {path}") from error
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or no timeline: {error}") from error


def turns(events: Sequence[Event]) -> list[str]:
    """Names of the turns, "session#index", in order of their first event."""
    names = [event.details.get("turn") for event in events]
    return list(dict.fromkeys(str(name) for name in names if name))


def busiest_turn(events: Sequence[Event]) -> str:
    """The turn for which most bytes were copied to the device.

    Raises:
        ValueError: no event belongs to a turn.
    """
    moved = dict.fromkeys(turns(events), 0)
    if not moved:
        raise ValueError("no event of the timeline belongs to a turn")
    for event in events:
        if event.track == "host to device" and event.details.get("turn"):
            moved[str(event.details["turn"])] += _bytes(event)
    return max(moved, key=lambda name: moved[name])


def check_turn(events: Sequence[Event], turn: str) -> None:
    """Raises ValueError, with the nearest names, if there is no such turn."""
    known = turns(events)
    if turn not in known:
        nearest = difflib.get_close_matches(turn, known, n=3, cutoff=0.0)
        raise ValueError(
            f"the timeline has no turn {turn!r}; nearest: {', '.join(nearest)}"
        )


def track_table(events: Sequence[Event], turn: str) -> list[TrackUse]:
    """What the turn did on each track, in the order of `TRACKS`."""
    rows = []
    for track in _tracks(events):
        ours = [e for e in _of_turn(events, turn) if e.track == track]
        if ours:
            rows.append(
                TrackUse(
                    track=track,
                    num_events=len(ours),
                    busy_s=busy_s((e.start_s, e.end_s) for e in ours),
                    num_bytes=sum(map(_bytes, ours)),
                )
            )
    return rows


def draw_turn(events: Sequence[Event], turn: str) -> Figure:
    """A row for each track, a bar for each event, coloured by layer group.

    Work of others in the meantime is grey; what the computing waited for is red. Saves
    that go on long after the prefill are cut off at the end of its picture.

    Raises:
        ValueError: there is no such turn.
    """
    from matplotlib import pyplot as plt

    check_turn(events, turn)
    ours = _of_turn(events, turn)
    prefill = [e for e in ours if e.track not in ("device to host", "host to disk")]
    start_s = min(e.start_s for e in prefill or ours)
    end_s = max(e.end_s for e in prefill or ours)
    span_s = 1.06 * (end_s - start_s)
    seen = [e for e in events if e.end_s > start_s and e.start_s < start_s + span_s]
    tracks = [t for t in _tracks(seen) if any(e.track == t for e in seen)]
    figure, axes = plt.subplots(
        figsize=(9, 0.9 + 0.45 * len(tracks)), layout="constrained"
    )
    for row, track in enumerate(tracks):
        on_track = [e for e in seen if e.track == track]
        _draw_track(axes, row, on_track, turn, start_s, span_s)
    axes.set_yticks(range(len(tracks)), tracks)
    axes.set_ylim(len(tracks) - 0.4, -0.6)
    axes.set_xlim(0, 1e3 * span_s)
    axes.set_xlabel("ms")
    axes.spines[["top", "right"]].set_visible(False)
    moved = sum(_bytes(e) for e in ours if e.track == "host to device")
    waited = busy_s((e.start_s, e.end_s) for e in ours if e.track == "wait")
    axes.set_title(
        f"{turn}: {moved / 2**20:.1f} MiB to the device,"
        f" {1e3 * waited:.1f} ms waited for; grey: other turns",
        fontsize=10,
        loc="left",
    )
    return figure


def _draw_track(
    axes: Axes,
    row: int,
    events: Sequence[Event],
    turn: str,
    start_s: float,
    span_s: float,
) -> None:
    from matplotlib import colormaps

    groups = [e.details["group"] for e in events if "group" in e.details]
    last = max((int(str(group)) for group in groups), default=0) or 1
    bars: dict[bool, list[tuple[tuple[float, float], object]]] = {True: [], False: []}
    for event in events:
        is_ours = event.details.get("turn") == turn
        group = event.details.get("group")
        color: object = _OTHERS
        if is_ours:
            color = "#1f77b4"
            if group is not None:
                color = colormaps["viridis"](0.15 + 0.75 * int(str(group)) / last)
            if event.track == "wait":
                color = _WAITS
        left, width = event.start_s - start_s, event.end_s - event.start_s
        bars[is_ours].append(((1e3 * left, 1e3 * width), color))
        is_seen = 0 <= left and left + width <= span_s
        if is_ours and group is not None and width > _LABEL_SHARE * span_s and is_seen:
            axes.text(
                1e3 * (left + width / 2),
                row,
                str(group),
                ha="center",
                va="center",
                color="white",
                fontsize=8,
            )
    for is_ours in (False, True):
        if bars[is_ours]:
            spans, colors = zip(*bars[is_ours], strict=True)
            axes.broken_barh(
                spans, (row - 0.35, 0.7), facecolors=colors, edgecolor="white", lw=0.4
            )


def _of_turn(events: Sequence[Event], turn: str) -> list[Event]:
    return [event for event in events if event.details.get("turn") == turn]


def _tracks(events: Sequence[Event]) -> list[str]:
    others = dict.fromkeys(e.track for e in events if e.track not in TRACKS)
    return [*TRACKS, *others]


def _bytes(event: Event) -> int:
    return int(str(event.details.get("bytes", 0)))
