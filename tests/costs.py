"""Constants of a made-up machine, for tests of costs and decisions."""

from hypothesis import strategies as st

from cachedattn_jax.engine.cost_model import ChunkCost, Constants, CostModel, Link

SIZES = (16, 64, 128)
PAGE_TOKENS = 16
PAGE_BYTES = 1 << 20
NUM_GROUPS = 8
# A chunk of 128 tokens takes 10 ms, a page 0.1 ms from the host, 1 ms from the disk.
CONSTANTS = Constants(
    host_to_device=Link(1e-5, PAGE_BYTES / 1e-4),
    device_to_host=Link(1e-5, PAGE_BYTES / 1e-4),
    disk_read=Link(1e-4, PAGE_BYTES / 1e-3),
    disk_write=Link(1e-4, PAGE_BYTES / 2e-3),
    prefill={
        16: ChunkCost(2e-3, 1e-7),
        64: ChunkCost(5.5e-3, 3e-7),
        128: ChunkCost(1e-2, 6e-7),
    },
    decode_step_s=4e-3,
)


def cost_model(constants: Constants | None = CONSTANTS, num_groups=NUM_GROUPS):
    return CostModel(
        constants,
        page_tokens=PAGE_TOKENS,
        page_bytes=PAGE_BYTES,
        num_groups=num_groups,
        chunk_sizes=SIZES,
    )


LINKS = st.builds(
    Link,
    st.floats(0.0, 1e-3),
    st.floats(-5, 0).map(lambda power: PAGE_BYTES / 10**power),
)
COSTS = st.builds(ChunkCost, st.floats(1e-5, 0.1), st.floats(0.0, 1e-5))
CONSTANT_SETS = st.builds(
    Constants,
    host_to_device=LINKS,
    device_to_host=LINKS,
    disk_read=LINKS,
    disk_write=st.none() | LINKS,
    prefill=st.fixed_dictionaries(dict.fromkeys(SIZES, COSTS)),
    decode_step_s=st.floats(0.0, 1.0),
)
