"""Pages on their way to the device: runs installed together, copies that tell of the
link.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachedattn_jax.engine import warm_up
from cachedattn_jax.store.device_pool import (
    RUN_PAGES,
    TOGETHER,
    DevicePool,
    split_runs,
)
from cachedattn_jax.store.host_tier import Slab
from cachedattn_jax.store.inbound import Inbound, Load
from cachedattn_jax.store.layout import Layout
from cachedattn_jax.store.link import EmulatedLink, Link
from cachedattn_jax.store.watcher import Watcher

LAYOUT = Layout(
    num_layers=4,
    layers_per_group=2,
    num_kv_heads=2,
    head_dim=8,
    page_tokens=4,
    dtype="float32",
    rope="",
    weights="",
)


def pool_on(platform: str, num_slots: int) -> DevicePool:
    """A pool that moves pages as on another platform."""
    pool = DevicePool(LAYOUT, num_slots, jax.devices()[0])
    pool.platform = platform
    return pool


def random_loads(
    pool: DevicePool, sizes: list[int], link: Link, watcher: Watcher
) -> tuple[list[Load], np.ndarray]:
    """Slabs in host memory, to go to slots in random order; [group, page, ...] too."""
    rng = np.random.default_rng(sum(sizes))
    shape = (LAYOUT.num_groups, sum(sizes), *LAYOUT.group_shape)
    pages = rng.normal(size=shape).astype(np.float32)
    slots = rng.permutation(pool.num_slots)[: sum(sizes)].astype(np.int32)
    loads, first = [], 0
    for size in sizes:
        rows = slice(first, first + size)
        slab = Slab(num_rows=size, num_bytes=0, rows_left=size)
        slab.groups += pool.put_on_host(list(pages[:, rows]))
        copy = link.carry(1, watcher.watch(slab.groups))
        slab.copies += [copy] * LAYOUT.num_groups
        copy.wait()
        loads.append(Load(slots=slots[rows], source=slab))
        first += size
    return loads, pages[:, np.argsort(slots)]


def test_runs_of_all_sizes_arrive_in_their_slots_in_few_programs():
    pool = DevicePool(LAYOUT, 90, jax.devices()[0])
    watcher, link = Watcher("test"), Link()
    sizes = [16, 1, 4, 1, 4, 16, 4, *[1] * TOGETHER, 16]
    loads, expected = random_loads(pool, sizes, link, watcher)
    inbound = Inbound(loads, pool, link, watcher)
    used = np.sort(np.concatenate([load.slots for load in loads]))
    unused = np.setdiff1d(np.arange(pool.num_slots), used)
    for group in range(LAYOUT.num_groups):
        assert inbound.wait(group)
        ends = inbound.install(group)
        # Three long ones, three of 4, and ten single ones in two programs.
        assert len(ends) == 4
        found = np.asarray(pool.arrays[group])
        np.testing.assert_array_equal(found[used], expected[group])
        assert not found[unused].any()
    watcher.close()


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_mixture_of_runs_arrives_but_for_rows_that_nobody_wants(platform, data):
    sizes = data.draw(st.lists(st.sampled_from(RUN_PAGES), min_size=1, max_size=12))
    num_slots = 12 * max(RUN_PAGES) + 3  # one size of pool is compiled
    pool = pool_on(platform, num_slots)
    watcher, link = Watcher("test"), Link()
    loads, _ = random_loads(pool, sizes, link, watcher)
    expected = np.zeros((LAYOUT.num_groups, num_slots, *LAYOUT.group_shape), np.float32)
    for load in loads:
        is_wanted = data.draw(st.lists(st.booleans(), min_size=1, max_size=16))
        for row, slot in enumerate(load.slots.tolist()):
            if is_wanted[row % len(is_wanted)]:
                for group in range(LAYOUT.num_groups):
                    expected[group, slot] = np.asarray(load.group(group))[row]
            else:
                load.slots[row] = pool.num_slots
    inbound = Inbound(loads, pool, link, watcher)
    for group in range(LAYOUT.num_groups):
        assert inbound.wait(group)
        inbound.install(group)
        np.testing.assert_array_equal(pool.arrays[group], expected[group])
    watcher.close()


@pytest.mark.parametrize(("platform", "num_sent"), [("cpu", 0), ("gpu", 3)])
def test_slots_go_to_another_device_once_with_the_first_group(platform, num_sent):
    pool = pool_on(platform, 90)
    watcher, link = Watcher("test"), Link()
    sizes = [16, 16, 4, 1, 1, 1]
    loads, _ = random_loads(pool, sizes, link, watcher)
    sent, installed, put, install = [], [], pool.put, pool.install

    def logged_put(runs):
        sent.append(sum(array.dtype == np.int32 for array in runs))
        assert len(runs) == len(sizes) + sent[-1]
        return put(runs)

    def logged_install(group, runs, bundles):
        installed.append([bundle.slots for bundle in bundles])
        return install(group, runs, bundles)

    pool.put, pool.install = logged_put, logged_install
    inbound = Inbound(loads, pool, link, watcher)
    for group in range(LAYOUT.num_groups):
        assert inbound.wait(group)
        inbound.install(group)
    assert sent == [num_sent, 0]
    # Nothing else of them is transferred: programs are given what is there.
    first, second = installed
    assert all(a is b for a, b in zip(first, second, strict=True))
    assert sum(isinstance(slots, jax.Array) for slots in first) == num_sent
    # What is counted as carried, and tells of the link, is pages.
    assert inbound.puts[0].num_bytes == inbound.puts[1].num_bytes
    watcher.close()


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_installs_of_a_turn_are_those_of_the_warm_up(platform):
    pool = pool_on(platform, 90)
    for size in RUN_PAGES:
        warm_up._copy(pool, size)
    watcher, link = Watcher("test"), Link()
    loads, _ = random_loads(pool, [16, 16, 4, 1, 1], link, watcher)
    traced = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration_secs, **_: traced.append(event)
    )
    try:
        inbound = Inbound(loads, pool, link, watcher)
        for group in range(LAYOUT.num_groups):
            assert inbound.wait(group)
            inbound.install(group)
    finally:
        jax.monitoring.clear_event_listeners()
    assert not [event for event in traced if "trace" in event or "compile" in event]
    watcher.close()


def test_a_copy_behind_a_program_tells_nothing_of_the_link():
    pool = DevicePool(LAYOUT, 20, jax.devices()[0])
    watcher, link = Watcher("test"), Link()
    loads, _ = random_loads(pool, [4, 1], link, watcher)
    inbound = Inbound(loads, pool, link, watcher)
    work = jax.jit(lambda x: jax.lax.fori_loop(0, 300, lambda _, y: y @ y / 500.0, x))
    slow = work(jnp.ones((500, 500)))
    pool.arrays[0] = jax.jit(lambda pool, x: pool + 0 * x[0, 0])(pool.arrays[0], slow)
    assert not pool.is_idle
    inbound.put_through(1)
    jax.block_until_ready(pool.arrays)
    inbound.put_through(2)
    assert inbound.num_put == 2 and inbound.unhindered == inbound.puts[1:]
    watcher.close()


def test_a_copy_of_pages_that_still_come_tells_nothing_of_the_link():
    pool = DevicePool(LAYOUT, 20, jax.devices()[0])
    watcher = Watcher("test")
    loads, _ = random_loads(pool, [4], Link(), watcher)
    coming = Link(EmulatedLink(bytes_per_s=1.0)).carry(3600, watcher.watch(()))
    source = loads[0].source
    assert isinstance(source, Slab)
    assert not coming.has_arrived
    source.copies[0] = coming
    assert not loads[0].has_come(0) and loads[0].has_come(1)
    watcher.close()


def test_on_an_emulated_link_every_copy_tells_of_it():
    pool = DevicePool(LAYOUT, 20, jax.devices()[0])
    watcher, link = Watcher("test"), Link(EmulatedLink(bytes_per_s=1e9))
    loads, _ = random_loads(pool, [4], link, watcher)
    inbound = Inbound(loads, pool, link, watcher)
    inbound.put_through(2)
    assert inbound.unhindered == inbound.puts and len(inbound.puts) == 2
    watcher.close()


def test_slots_are_shared_out_among_runs_of_known_sizes():
    assert [len(run) for run in split_runs(range(16 + 4 + 4 + 1))] == [16, 4, 4, 1]
