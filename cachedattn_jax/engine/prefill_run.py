"""One prefill under way, layer group by layer group.

Knows the order of copies and programs. Does not know what the programs compute.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax

from cachedattn_jax.engine.rewrite import Rewrite
from cachedattn_jax.store.inbound import Inbound

if TYPE_CHECKING:
    from cachedattn_jax.engine.prefill import Prefill

# Layer groups that are dispatched and not yet computed while pages arrive. Each of them
# may keep its copy in device memory, so they are bounded; with only 2, an H200 waited
# for the host between layers of 0.5 ms.
_DISPATCH_AHEAD = 8


@dataclass(eq=False, kw_only=True)
class Chunk:
    """Tokens that go through a program together.

    Attributes:
        x: the hidden state after the groups dispatched so far, [1, size, hidden].
        start: position of the first of them.
        where: page table, start and length on the device, as the attention ops take
            them: every layer group needs them.
    """

    num_tokens: int
    x: jax.Array
    start: int
    where: tuple[jax.Array, jax.Array, jax.Array]


class PrefillRun:
    """One prefill under way.

    Groups follow each other, and within a group the steps: so the computing of all
    chunks hides the loading of the next group, not only that of the first. What is
    dropped on the way is a change of the page table from one chunk to the next.

    Attributes:
        steps: what each group does, in this order.
        group: the next to be dispatched.
        computes: per group dispatched, when, and when it had computed; per prefill
            where no pages arrive.
    """

    def __init__(
        self,
        programs: "Prefill",
        steps: "list[Chunk | Rewrite]",
        inbound: Inbound | None,
        read_ahead: int,
        is_preloading: bool,
        on_group: Callable[[int], None] | None,
    ) -> None:
        self.steps = steps
        self.group = 0
        self.computes: list[tuple[float, Future[float]]] = []
        self.installs: list[tuple[float, Future[float]]] = []
        self._programs = programs
        self._inbound = inbound if inbound is not None and inbound.loads else None
        self._ahead = max(1, read_ahead)
        self._is_preloading = is_preloading
        self._on_group = on_group

    @property
    def chunks(self) -> list[Chunk]:
        return [step for step in self.steps if isinstance(step, Chunk)]

    @property
    def is_dispatched(self) -> bool:
        return self.group == self._programs.num_groups

    @property
    def num_tokens(self) -> int:
        """Tokens computed."""
        return sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def num_padded(self) -> int:
        """Tokens computed, padding included."""
        return sum(chunk.x.shape[1] for chunk in self.chunks)

    def needed(self, group: int) -> int:
        """The last layer group whose pages must be there before this one computes."""
        return group if self._is_preloading else self._programs.num_groups - 1

    def advance(self, *, is_gated: bool = False, until_s: float | None = None) -> bool:
        """Dispatches groups as long as their pages are there; whether it was all.

        Args:
            is_gated: a group is dispatched when its pages are on the device, so that
                others can use the device until then. Otherwise the device waits.
            until_s: when it stops waiting for pages, of the monotonic clock; None for
                when they are there.
        """
        while not self.is_dispatched:
            if not self._wait(is_gated, until_s):
                return False
            self._dispatch()
        return True

    def _wait(self, is_gated: bool, until_s: float | None) -> bool:
        inbound = self._inbound
        if inbound is None:
            return True
        needed = self.needed(self.group)
        is_gated = is_gated or not self._is_preloading
        is_there = inbound.has_arrived if is_gated else inbound.is_put
        if is_there(needed) and not inbound.has_failed:
            return True
        patience_s = None if until_s is None else max(0.0, until_s - time.monotonic())
        return inbound.wait(needed, patience_s, only_put=not is_gated)

    def _dispatch(self) -> None:
        group, inbound, programs = self.group, self._inbound, self._programs
        if inbound is not None:
            if len(self.computes) >= _DISPATCH_AHEAD:
                wait([self.computes[-_DISPATCH_AHEAD][1]])
            started_s = time.monotonic()
            installs = inbound.install(group)
            self.installs.append((started_s, programs.watcher.watch(installs)))
            # Not before the install: on CUDA a copy waits for programs dispatched
            # before it, and so does not take the link from the group in front of it.
            if programs.puts_first:
                inbound.put_through(group + 1 + self._ahead)
        started_s = time.monotonic()
        for step in self.steps:
            programs.compute(group, step)
        if inbound is not None:
            if not programs.puts_first:
                inbound.put_through(group + 1 + self._ahead)
            done = programs.watcher.watch(self.chunks[-1].x)
            self.computes.append((started_s, done))
        elif group == 0:
            self._started_s = started_s
        self.group += 1
        if inbound is None and self.is_dispatched:
            done = programs.watcher.watch(self.chunks[-1].x)
            self.computes.append((self._started_s, done))
        if self._on_group is not None:
            self._on_group(group)
