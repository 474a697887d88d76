"""Device memory for pages: one array of slots per layer group, and the free slots.

Knows arrays and slots. Does not know which page a slot holds.
"""

import functools
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from cachedattn_jax.store.layout import Layout
from cachedattn_jax.store.objects.faults import Faults
from pallas_kernels.page_copy import extract_pages, install_pages

# Pages travel in runs of these sizes, largest first, without padding: a fixed page
# count per program, and each program is compiled once.
RUN_PAGES = (16, 4, 1)
# Runs of one size are installed so many at a time: with 6 of them for each of 32
# layers, a program for each took longer to dispatch than the layer to compute on an
# H200.
TOGETHER = 8

Item = TypeVar("Item")


@functools.partial(jax.jit, donate_argnums=0)
def _install(pool, pages, slots):
    # The pool is donated to the next program, so something else tells the end of this.
    return install_pages(pool, pages, slots), slots[:1]


@functools.partial(jax.jit, donate_argnums=0)
def _install_together(pool, runs, slots):
    for pages, run in zip(runs, slots, strict=True):
        pool = install_pages(pool, pages, run)
    return pool, slots[0, :1]


@functools.partial(jax.jit, static_argnames="memory")
def _extract(pools, slots, memory):
    runs = [extract_pages(pool, slots) for pool in pools]
    return runs if memory is None else jax.device_put(runs, memory)


def split_runs(items: Sequence[Item]) -> Iterator[list[Item]]:
    """The runs in which so many pages, slots or the like travel."""
    left = iter(items)
    num_left = len(items)
    for size in RUN_PAGES:
        for _ in range(num_left // size):
            yield list(islice(left, size))
        num_left %= size


def storage_dtype(layout: Layout, platform: str) -> jnp.dtype:
    """The dtype of pool arrays; see `pallas_kernels.page_copy.to_storage` for why."""
    if layout.dtype == "bfloat16" and platform == "cpu":
        return jnp.dtype(jnp.uint16)
    return jnp.dtype(layout.dtype)


class DevicePool:
    """Slots of donated arrays `[slots, layers_per_group, kv_heads, 2, page_tokens,
    dim]`.

    `arrays` holds one array per layer group; whoever passes one to a donating call
    stores the result back. One slot number spans all groups. `faults`, if there are
    any, strike copies from and to host memory.
    """

    def __init__(self, layout: Layout, num_slots: int, device: jax.Device) -> None:
        self.layout = layout
        self.num_slots = num_slots
        self.platform = device.platform
        self.dtype = storage_dtype(layout, device.platform)
        self.device_sharding = jax.sharding.SingleDeviceSharding(device)
        self.host_sharding = self.device_sharding.with_memory_kind("pinned_host")
        self.faults: Faults | None = None
        self._free: list[int] = []
        self.arrays: list[jax.Array] = []
        self.rebuild()

    def rebuild(self) -> None:
        """Makes every slot free and every array new; what they held is lost."""
        shape = (self.num_slots, *self.layout.group_shape)
        self.arrays.clear()
        # Committed to the device like everything that is put there: an argument that
        # turns from uncommitted to committed is a new program to jit.
        self.arrays += [
            jnp.zeros(shape, self.dtype, device=self.device_sharding)
            for _ in range(self.layout.num_groups)
        ]
        self._free[:] = range(self.num_slots - 1, -1, -1)

    @property
    def is_on_host(self) -> bool:
        """Whether the memory of the device is that of the host."""
        return self.platform == "cpu"

    @property
    def is_lost(self) -> bool:
        """Whether a donating call failed and took an array with it."""
        return any(array.is_deleted() for array in self.arrays)

    @property
    def is_idle(self) -> bool:
        """Whether every program on the arrays has ended."""
        arrays: list[Any] = self.arrays  # jax's stubs do not know `is_ready`
        return not self.is_lost and all(array.is_ready() for array in arrays)

    @property
    def copies_share_link(self) -> bool:
        """Whether copies to the device go at the same time, not one after the other.

        XLA spreads those from pinned memory over 4 streams of CUDA.
        """
        return self.platform == "gpu"

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, num_slots: int) -> list[int]:
        """Takes free slots; the caller has made sure that there are enough."""
        assert num_slots <= len(self._free), (num_slots, len(self._free))
        return [self._free.pop() for _ in range(num_slots)]

    def give_back(self, slot: int) -> None:
        """Makes a slot free again."""
        self._free.append(slot)

    def put(self, runs: Sequence[np.ndarray | jax.Array]) -> list[jax.Array]:
        """Starts the copies of runs of one layer group to the device."""
        if self.faults is not None:
            self.faults.strike_host()
        return jax.device_put(list(runs), self.device_sharding)

    def install(
        self, group: int, runs: Sequence[tuple[jax.Array, np.ndarray]]
    ) -> list[jax.Array]:
        """Writes runs that were `put`, each with the slots of its pages.

        Slots equal to `num_slots` are left out.

        Returns:
            Arrays that are ready when the pages are in the pool.
        """
        by_size: dict[int, list[tuple[jax.Array, np.ndarray]]] = {}
        for run in runs:
            by_size.setdefault(len(run[1]), []).append(run)
        return [
            self._install(group, alike[start : start + TOGETHER])
            for alike in by_size.values()
            for start in range(0, len(alike), TOGETHER)
        ]

    def _install(
        self, group: int, runs: Sequence[tuple[jax.Array, np.ndarray]]
    ) -> jax.Array:
        """At most `TOGETHER` runs of one size, in one program."""
        pages, slots = zip(*runs, strict=True)
        if len(runs) == 1:
            arguments = pages[0], slots[0]
            self.arrays[group], is_done = _install(self.arrays[group], *arguments)
            return is_done
        num_left = TOGETHER - len(runs)
        where = np.full((TOGETHER, len(slots[0])), self.num_slots, np.int32)
        where[: len(runs)] = slots
        self.arrays[group], is_done = _install_together(
            self.arrays[group], [*pages, *pages[:1] * num_left], where
        )
        return is_done

    def take_host_memory(self, num_bytes: int) -> None:
        """Makes jax page-lock so much host memory now, and keep it for later copies.

        Raises:
            ValueError: it cannot have so much.
        """
        shape = (max(RUN_PAGES), *self.layout.group_shape)
        run = jnp.zeros(shape, self.dtype, device=self.device_sharding)
        try:
            runs = [run] * (num_bytes // run.nbytes)
            jax.block_until_ready(jax.device_put(runs, self.host_sharding))
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(
                f"{num_bytes} bytes of host memory cannot be page-locked;"
                " XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB limits what jax takes, to 64 if"
                f" not set: {error}"
            ) from error

    def extract(
        self, slots: Sequence[int], *, to_host: bool = False
    ) -> list[jax.Array]:
        """Copies a run out of the pool, one array a group.

        Args:
            to_host: to pinned host memory and not on the device. Only CPUs do that at
                the speed of memory: elsewhere later programs wait for the link.
        """
        return self._extract(self.arrays, slots, to_host)

    def extract_group(
        self, group: int, slots: Sequence[int], *, to_host: bool = False
    ) -> jax.Array:
        """The same of one layer group."""
        return self._extract(self.arrays[group : group + 1], slots, to_host)[0]

    def _extract(
        self, pools: list[jax.Array], slots: Sequence[int], to_host: bool
    ) -> list[jax.Array]:
        memory = self.host_sharding if to_host else None
        return _extract(pools, np.asarray(slots, np.int32), memory=memory)

    def put_on_host(
        self, runs: Sequence[np.ndarray | jax.Array], *, are_there: bool = False
    ) -> list[jax.Array]:
        """Starts the copies of runs to pinned host memory.

        Args:
            are_there: they are arrays of jax that need no copy.
        """
        if self.faults is not None:
            self.faults.strike_host()
        if are_there:
            return cast(list[jax.Array], list(runs))
        return jax.device_put(list(runs), self.host_sharding)
