"""Copies of pages on their way from the device to host memory, under a bound of bytes.

Knows slabs, copies and events. Does not know which pages are saved, or why.
"""

from collections import Counter, deque
from dataclasses import dataclass

import jax

from cachedattn_jax.store.device_pool import DevicePool
from cachedattn_jax.store.exits import Exits
from cachedattn_jax.store.host_tier import Slab
from cachedattn_jax.store.link import Copy, Links
from cachedattn_jax.store.page_index import PageIndex
from cachedattn_jax.store.placement.tier import Tier
from cachedattn_jax.store.watcher import Watcher
from cachedattn_jax.timeline import Timeline


@dataclass(eq=False, kw_only=True)
class _Flight:
    """A copy under way to host memory, and what it carries."""

    copy: Copy
    num_bytes: int
    turn: str
    group: int | None
    slab: Slab


class Outbound:
    """Copies under way, the oldest first.

    Args:
        capacity_bytes: of them and of what is charged ahead of its copy; all of it is
            device memory.

    Attributes:
        num_bytes: how much it is now. Who sends charges it first; a copy that has ended
            takes its share away.
    """

    def __init__(
        self,
        index: PageIndex,
        pool: DevicePool,
        exits: Exits,
        links: Links,
        watchers: "dict[str, Watcher]",
        timeline: Timeline,
        counters: Counter[str],
        capacity_bytes: int,
    ) -> None:
        self.num_bytes = 0
        self._capacity_bytes = capacity_bytes
        self._index = index
        self._pool = pool
        self._exits = exits
        self._links = links
        self._watchers = watchers
        self._timeline = timeline
        self._counters = counters
        self._flights: deque[_Flight] = deque()

    @property
    def copies(self) -> list[Copy]:
        return [flight.copy for flight in self._flights]

    @property
    def is_direct(self) -> bool:
        """Whether pages are to be extracted to host memory: on a CPU that is faster
        than a copy of a copy. An emulated link takes the time of the second one.
        """
        return self._pool.is_on_host and not self._is_emulated

    @property
    def carries_tokens(self) -> bool:
        """Whether the copies of tokens go the same way: not on a CPU, whose memory is
        the host's, nor over an emulated link, which carries nothing else.
        """
        return not (self._pool.is_on_host or self._is_emulated)

    @property
    def is_busy(self) -> bool:
        """Whether one more copy would delay the tokens of the steps to come.

        A copy waits for the programs dispatched before it, the step in flight included.
        So it starts just when the token of that step is due, which comes after it: on
        an H100 11 ms late, as much as a decode step, behind 12 copies of 2 ms. An
        emulated link carries no tokens; two copies keep it busy.
        """
        return len(self._flights) >= (2 if self._is_emulated else 1)

    @property
    def _is_emulated(self) -> bool:
        return self._links.device_to_host.emulated is not None

    def fits(self, num_bytes: int) -> bool:
        """Whether it takes so many bytes more; while empty it takes any."""
        is_empty = self.num_bytes == 0
        return is_empty or self.num_bytes + num_bytes <= self._capacity_bytes

    def send(
        self, slab: Slab, runs: list[jax.Array], turn: str, group: int | None = None
    ) -> None:
        """Starts the copy of the next layer groups of a slab to host memory.

        Args:
            runs: extracted pages, an array a group.
            turn, group: how events note it; `group` where it is one.
        """
        on_host = self._pool.put_on_host(runs, are_there=self._pool.is_on_host)
        # What was extracted to host memory was copied by that, and waits for nothing.
        after = None if self.is_direct else self._watchers["compute"].watch(runs)
        done = self._watchers["device-to-host"].watch(on_host)
        num_bytes = sum(run.nbytes for run in runs)
        copy = self._links.device_to_host.carry(num_bytes, done, after)
        slab.groups += on_host
        slab.copies += [copy] * len(on_host)
        self._counters["bytes_device_to_host"] += num_bytes
        self._flights.append(
            _Flight(copy=copy, num_bytes=num_bytes, turn=turn, group=group, slab=slab)
        )

    def settle(self) -> None:
        """Takes note of copies that have ended; never waits."""
        while self._flights and self._flights[0].copy.has_ended:
            self._land(self._flights.popleft())

    def settle_oldest(self) -> None:
        """Waits for the oldest copy, and takes note of all that have ended then."""
        self._flights[0].copy.wait()
        self.settle()

    def _land(self, flight: _Flight) -> None:
        self.num_bytes -= flight.num_bytes
        if flight.copy.has_failed:
            self._counters["save_failures"] += 1
            flight.slab.is_broken = True
            for entry in list(self._index.in_tier(Tier.HOST)):
                # A turn that is to load it has leased the slab: its own copy fails.
                is_awaited = entry.holds and entry.slot is None
                if entry.slab is flight.slab and not is_awaited:
                    self._exits.leave_host(entry)
            return
        start_s, end_s = flight.copy.span
        self._counters["us_device_to_host"] += int(1e6 * (end_s - start_s))
        details = {"bytes": flight.num_bytes, "turn": flight.turn}
        if flight.group is not None:
            details["group"] = flight.group
        self._timeline.add("save", "device to host", start_s, end_s, **details)
