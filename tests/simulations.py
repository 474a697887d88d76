"""Small systems and traces for the simulator, and what must hold at every event."""

import numpy as np

from cachedattn_jax.simulator.hardware import ModelShape, linear_constants
from cachedattn_jax.simulator.simulation import Simulation
from cachedattn_jax.simulator.system import System
from cachedattn_jax.simulator.trace import Trace
from cachedattn_jax.store.placement.placement_config import PlacementConfig
from cachedattn_jax.store.placement.tier import Tier

KV_BYTES = 10
MODEL = ModelShape(
    name="toy",
    kv_bytes=KV_BYTES,
    window=64,
    num_layers=4,
    num_parameters=1e6,
    weight_bytes=2e6,
)
CONSTANTS = linear_constants(
    prefill_s_per_token=0.01,
    decode_step_s=0.02,
    host_link_bytes_per_s=10_000.0,
    disk_read_bytes_per_s=2_000.0,
    disk_write_bytes_per_s=2_000.0,
)


def system(
    *, device_pages=None, host_pages=20, disk_pages=40, page_tokens=4, **options
) -> System:
    """A toy whose budgets are given in pages; other options as in both configs."""
    of_placement = {"policy": "lookahead", "host_reserve": 0.0}
    for name in ("policy", "host_reserve", "granularity", "is_prefetching", "ttl_s"):
        if name in options:
            of_placement[name] = options.pop(name)
    for name in ("quotas", "default_quota"):
        if name in options:
            of_placement[name] = options.pop(name)
    is_window = options.get("allocation") == "window"
    size = (MODEL.window if is_window else page_tokens) * KV_BYTES
    settings = {"model": MODEL, "constants": CONSTANTS, "max_batch": 2, **options}
    return System(
        host_bytes=host_pages * size,
        disk_bytes=disk_pages * size,
        device_bytes=None if device_pages is None else device_pages * size,
        page_tokens=page_tokens,
        placement=PlacementConfig(**of_placement),
        **settings,
    )


def trace(sessions, **options) -> Trace:
    """Of sessions [(arrival, [(think, new, output), ...]), ...]."""
    turns = [turn for _, turns in sessions for turn in turns]
    columns = np.asarray(turns, float).T
    return Trace(
        name="toy",
        arrival_s=np.asarray([arrival for arrival, _ in sessions], float),
        first_row=np.cumsum([0, *(len(turns) for _, turns in sessions)]),
        think_s=columns[0],
        new_tokens=columns[1].astype(int),
        output_tokens=columns[2].astype(int),
        **options,
    )


def random_trace(rng, num_sessions=12, *, most=30, size=None, **options) -> Trace:
    """Sessions of 1 to 5 turns; with `size`, every turn adds as many tokens."""

    def turn(place: int) -> tuple[float, int, int]:
        think = float(rng.exponential(3.0)) if place else 0.0
        if size is not None:
            return think, size - 2, 2
        return think, int(rng.integers(1, most)), int(rng.integers(1, most))

    arrivals = np.cumsum(rng.exponential(1.0, num_sessions))
    return trace(
        [
            (arrival, [turn(place) for place in range(rng.integers(1, 6))])
            for arrival in arrivals
        ],
        **options,
    )


class Watched(Simulation):
    """A simulation that looks at every store after every event."""

    def _submit(self, session: int, place: int, now: float) -> None:
        super()._submit(session, place, now)
        self.look()

    def _wake(self, number: int, now: float) -> None:
        super()._wake(number, now)
        self.look()

    def look(self) -> None:
        for replica in self.replicas:
            check_store(replica)


def check_store(replica) -> None:
    """Budgets are kept, and all accounts say the same."""
    store, placement, system_ = replica.store, replica.placement, replica.system
    size = system_.page_bytes
    held = list(store.index.sessions.values())
    on_device = sum(pages.device.bit_count() for pages in held)
    assert on_device <= store.index.num_device <= system_.num_slots or (
        system_.device_bytes is None
    )
    assert store.index.num_host == sum(pages.host.bit_count() for pages in held)
    assert store.index.num_disk == sum(pages.disk.bit_count() for pages in held)
    assert store.index.num_host * size <= system_.host_bytes
    assert store.index.num_disk * size <= system_.disk_bytes
    for pages in held:
        assert not pages.arriving & ~pages.host
        assert pages.holds >= 0
        standing = placement.standings[pages.session]
        assert standing.num_bytes == {
            tier: mask.bit_count() * size
            for tier, mask in zip(
                Tier, (pages.device, pages.host, pages.disk), strict=True
            )
            if mask
        }
        alone = pages.disk & ~(pages.host | pages.device)
        assert standing.disk_only_bytes == alone.bit_count() * size
