"""What happened when: spans of time on named tracks. Knows no engine and no store.

Tracks are the things that can be busy, in the order a page meets them: `TRACKS`.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

TRACKS = (
    "wait",
    "disk to host",
    "host to device",
    "install",
    "compute",
    "device to host",
    "host to disk",
)


@dataclass(frozen=True, kw_only=True)
class Event:
    """One span of time.

    Attributes:
        track: what was busy, one of `TRACKS`.
        start_s, end_s: seconds of the monotonic clock.
        details: `turn` ("session#index") where it belongs to one turn, `group` of
            layers, `bytes` moved, `batch` of a decode step.
    """

    name: str
    track: str
    start_s: float
    end_s: float
    details: dict[str, object] = field(default_factory=dict)


def busy_s(spans: Iterable[tuple[float, float]]) -> float:
    """Time covered by spans (start, end), where they overlap only once."""
    total, covered_to = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, covered_to))
        covered_to = max(covered_to, end)
    return total


class Timeline:
    """Events in the order they were noted, at most `max_events`; any thread may add."""

    def __init__(self, max_events: int = 200_000) -> None:
        self.events: list[Event] = []
        self.num_dropped = 0
        self._max_events = max_events

    def add(
        self, name: str, track: str, start_s: float, end_s: float, **details: object
    ) -> None:
        """Notes a span that has ended."""
        if len(self.events) >= self._max_events:
            self.num_dropped += 1
            return
        self.events.append(
            Event(name=name, track=track, start_s=start_s, end_s=end_s, details=details)
        )

    @contextmanager
    def span(self, name: str, track: str, **details: object) -> Iterator[None]:
        """Notes how long the body takes on the calling thread."""
        start_s = time.monotonic()
        try:
            yield
        finally:
            self.add(name, track, start_s, time.monotonic(), **details)

    def chrome_trace(self) -> dict[str, object]:
        """The events in the trace format that Perfetto and Chrome open."""
        tracks = {event.track: None for event in self.events}
        numbers = {track: number for number, track in enumerate(tracks, start=1)}
        origin = min((event.start_s for event in self.events), default=0.0)
        names = [
            {
                "ph": "M",
                "name": "thread_name",
                "pid": 1,
                "tid": number,
                "args": {"name": track},
            }
            for track, number in numbers.items()
        ]
        spans = [
            {
                "ph": "X",
                "name": event.name,
                "pid": 1,
                "tid": numbers[event.track],
                "ts": (event.start_s - origin) * 1e6,
                "dur": (event.end_s - event.start_s) * 1e6,
                "args": event.details,
            }
            for event in self.events
        ]
        return {"traceEvents": [*names, *spans], "displayTimeUnit": "ms"}
