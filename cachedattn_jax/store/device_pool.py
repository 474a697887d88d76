"""Device memory for pages: one array of slots per layer group, and the free slots.

Knows arrays and slots. Does not know which page a slot holds.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """Runs of one size that one program installs, the same in every layer group.

    Attributes:
        runs: their places among the runs that are put together.
        slots: int32, where their pages go: [run] of one, [TOGETHER, run] of several.
            Rows that are left go past the pool.
    """

    runs: tuple[int, ...]
    slots: np.ndarray | jax.Array


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

    def put_with_slots(
        self, runs: Sequence[np.ndarray | jax.Array], bundles: Sequence[Bundle]
    ) -> tuple[list[jax.Array], list[Bundle]]:
        """The same for the first layer group that is put: the slots go along.

        Returns:
            The runs, and the bundles to install every layer group with.
        """
        # A program takes NumPy's 2 us later than the device's on a CPU, where a copy
        # takes 30, and 0.1 ms later on CUDA.
        if self.is_on_host:
            return self.put(runs), list(bundles)
        arrays = self.put([*runs, *[bundle.slots for bundle in bundles]])
        there = zip(bundles, arrays[len(runs) :], strict=True)
        return arrays[: len(runs)], [replace(b, slots=slots) for b, slots in there]

    def bundle(self, slots: Sequence[np.ndarray]) -> list[Bundle]:
        """The programs that install runs.

        Args:
            slots: int32 [run], of each run that is put, in that order; those equal to
                `num_slots` are left out.
        """
        by_size: dict[int, list[int]] = {}
        for index, run in enumerate(slots):
            by_size.setdefault(len(run), []).append(index)
        bundles = []
        for size, alike in by_size.items():
            for start in range(0, len(alike), TOGETHER):
                runs = tuple(alike[start : start + TOGETHER])
                where = slots[runs[0]]
                if len(runs) > 1:
                    where = np.full((TOGETHER, size), self.num_slots, np.int32)
                    where[: len(runs)] = [slots[index] for index in runs]
                bundles.append(Bundle(runs=runs, slots=where))
        return bundles

    def install(
        self, group: int, runs: Sequence[jax.Array], bundles: Sequence[Bundle]
    ) -> list[jax.Array]:
        """Writes runs that were `put` into their slots, a program for each bundle.

        Returns:
            Arrays that are ready when the pages are in the pool.
        """
        return [
            self._install(group, [runs[index] for index in bundle.runs], bundle.slots)
            for bundle in bundles
        ]

    def _install(
        self, group: int, runs: list[jax.Array], slots: np.ndarray | jax.Array
    ) -> jax.Array:
        pool = self.arrays[group]
        if len(runs) == 1:
            self.arrays[group], is_done = _install(pool, runs[0], slots)
        else:
            runs = [*runs, *runs[:1] * (TOGETHER - len(runs))]
            self.arrays[group], is_done = _install_together(pool, runs, slots)
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
