"""Connections between memories: copies under way, and links that are emulated.

Knows bytes and seconds. Does not know what is copied.

A machine without an accelerator has no PCIe. An emulated link delays the completion of
every copy as a slower connection would, and burns no CPU while it does: the copy itself
is done at once, and counts as done when the link's time is over.
"""

import time
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import no_type_check


@no_type_check  # gin passes what users write; checked here in words of ours
@dataclass(frozen=True, kw_only=True)
class EmulatedLink:
    """A connection slower than the machine's own, the same in both directions.

    Attributes:
        bytes_per_s: what it carries.
        latency_s: added to every copy; copies behind it do not wait for that.
    """

    bytes_per_s: float
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("bytes_per_s", 1), ("latency_s", 0)):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not least <= value < float("inf"):
                raise ValueError(f"{name}={value!r} must be at least {least}")


class Copy:
    """Bytes on their way between two memories; made by `Link.carry`.

    Attributes:
        num_bytes: how many.
        done: the moment when the real copy ended, seconds of the monotonic clock.
    """

    def __init__(
        self,
        num_bytes: int,
        done: "Future[float]",
        after: "Future[float] | None",
        emulated: EmulatedLink | None,
        previous: "Copy | None",
    ) -> None:
        self.num_bytes = num_bytes
        self.done = done
        self._handed_s = time.monotonic()
        self._after = after
        self._emulated = emulated
        self._previous = previous
        self._times: tuple[float, float] | None = None  # start, end of the link's work

    @property
    def has_arrived(self) -> bool:
        """Whether the bytes are there and the link's time for them is over."""
        if not self.done.done() or not self._resolve():
            return False
        return time.monotonic() >= self._due_s

    @property
    def can_be_read(self) -> bool:
        """Whether a copy from there may be handed in: JAX orders real ones itself."""
        return self._emulated is None or self.has_arrived

    @property
    def has_ended(self) -> bool:
        """Whether it has arrived or never will."""
        return self.has_arrived or self.has_failed

    @property
    def is_good(self) -> bool:
        """Whether the real copy has ended, and well."""
        return self.done.done() and self.done.exception() is None

    @property
    def has_failed(self) -> bool:
        return self.done.done() and self.done.exception() is not None

    @property
    def span(self) -> tuple[float, float]:
        """When it started and ended; waits for it and raises what went wrong."""
        end_s = self.done.result()
        self.wait()
        assert self._times is not None
        return self._times[0], max(*self._times, end_s, self._due_s)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until it has arrived, not longer than this; whether it has."""
        end_s = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        chain = self._unresolved()
        futures = [f for copy in chain for f in (copy.done, copy._after) if f]
        wait([self.done, *futures], timeout_s)
        left_s = min(self._due_s, end_s) - time.monotonic() if self._resolve() else 0
        if left_s > 0:
            time.sleep(left_s)
        return self.has_arrived

    @property
    def _due_s(self) -> float:
        """When an emulated link is through with it; 0 on a real one."""
        if self._emulated is None or self._times is None:
            return 0.0
        return self._times[1] + self._emulated.latency_s

    def _unresolved(self) -> "list[Copy]":
        """This copy and those before it whose times are open, the earliest last."""
        chain: list[Copy] = []
        copy: Copy | None = self
        while copy is not None and copy._times is None:
            chain.append(copy)
            copy = copy._previous
        return chain

    def _resolve(self) -> bool:
        """Whether the times are known, which needs those of the copies before."""
        for copy in reversed(self._unresolved()):
            previous, futures = copy._previous, [copy._after]
            if copy._emulated is None:
                futures.append(copy.done)
            if not all(future is None or future.done() for future in futures):
                return False
            start_s = copy._handed_s
            if previous is not None and previous._times is not None:
                start_s = max(start_s, previous._times[1])
            if copy._after is not None and not copy._after.exception():
                start_s = max(start_s, copy._after.result())
            end_s = start_s
            if copy._emulated is not None:
                end_s += copy.num_bytes / copy._emulated.bytes_per_s
            elif not copy.done.exception():
                end_s = max(start_s, copy.done.result())
            copy._times, copy._previous = (start_s, end_s), None
        return True


class Link:
    """One direction of a connection; its copies follow each other."""

    def __init__(self, emulated: EmulatedLink | None = None) -> None:
        self.emulated = emulated
        self._last: Copy | None = None

    def carry(
        self,
        num_bytes: int,
        done: "Future[float]",
        after: "Future[float] | None" = None,
    ) -> Copy:
        """A copy that was handed to the machine just now.

        Args:
            done: ends with the real copy.
            after: ends when the bytes are there to be copied, if they are not yet.
        """
        self._last = Copy(num_bytes, done, after, self.emulated, self._last)
        return self._last


class Links:
    """The four directions between device, host and disk."""

    def __init__(
        self, host_device: EmulatedLink | None, disk_host: EmulatedLink | None
    ) -> None:
        self.emulate(host_device, disk_host)

    @property
    def are_emulated(self) -> bool:
        """Whether any of them is."""
        links = (self.host_to_device, self.disk_to_host)
        return any(link.emulated is not None for link in links)

    def emulate(
        self, host_device: EmulatedLink | None, disk_host: EmulatedLink | None
    ) -> None:
        """Replaces all links; None for the machine's own."""
        self.host_to_device, self.device_to_host = Link(host_device), Link(host_device)
        self.disk_to_host, self.host_to_disk = Link(disk_host), Link(disk_host)
