"""Tensor parallelism: devices that share the kv heads compute what one does.

Runs in a process of its own, since the number of CPU devices is fixed at start-up.
"""

import os
import subprocess
import sys

import pytest
from jax.sharding import AbstractMesh

from cachedattn_jax.model.config import preset
from cachedattn_jax.model.sharding import check_mesh

SCRIPT = """
import functools, re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from cachedattn_jax.model.config import preset
from cachedattn_jax.model.llama import embed, init_params
from cachedattn_jax.model.paged import decode_step, prefill_group
from cachedattn_jax.model.sharding import AXIS, POOL_SPEC, param_specs
from pallas_kernels.backends import Kernels
from pallas_kernels.rope import rope_tables

config = preset("tiny", window=64, num_layers=2, num_heads=8, num_kv_heads=4)
params = init_params(config, seed=0)
rope = rope_tables(config.inverse_frequencies(), page_tokens=16, num_pages=4)
shape = (9, config.num_layers, config.num_kv_heads, 2, 16, config.head_dim)
tables = jnp.asarray([[3, 1, 7, 0], [2, 8, 4, 5]], jnp.int32)
starts, lengths = jnp.zeros(2, jnp.int32), jnp.asarray([20, 31], jnp.int32)
tokens = jax.random.randint(jax.random.key(1), (2, 32), 0, config.vocab_size)

def compiled(function, mesh, *arguments):
    program = jax.jit(functools.partial(function, config, mesh=mesh))
    return program.lower(*arguments).compile()

def run(params, pool, mesh):
    x = embed(config, params, tokens)
    arguments = params.layers, x, pool, tables, starts, lengths, rope
    prefill = compiled(prefill_group, mesh, *arguments)
    x, pool = prefill(*arguments)
    arguments = params, tokens[:, 0], [pool], tables, lengths + 1, rope
    logits, pools = compiled(decode_step, mesh, *arguments)(*arguments)
    return logits, pools[0], prefill.as_text()

expected, expected_pool, _ = run(params, jnp.zeros(shape), None)
for devices in (2, 4):
    mesh = jax.make_mesh(
        (devices,), (AXIS,), (AxisType.Auto,), devices=jax.devices()[:devices])
    place = functools.partial(NamedSharding, mesh)
    sharded = jax.device_put(params, jax.tree.map(place, param_specs(params)))
    pool = jax.device_put(jnp.zeros(shape), place(POOL_SPEC))
    logits, pool, text = run(sharded, pool, mesh)
    assert pool.sharding.is_equivalent_to(place(POOL_SPEC), pool.ndim), pool.sharding
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(pool, expected_pool, rtol=1e-4, atol=1e-4)
    # A layer adds up twice. Nothing else is sent: each device has whole kv heads.
    sent = re.findall(r" (all-\\w+|collective-\\w+|reduce-scatter)\\(", text)
    assert sent == 2 * config.num_layers * ["all-reduce"], sent
print("same")
"""


def test_several_devices_compute_what_one_does_and_send_only_sums():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "NPROC": "16",  # jax 0.10 deadlocks with fewer threads than collectives want
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "same", done.stderr[-2000:]


@pytest.mark.parametrize(
    ("shape", "axis", "message"),
    [(3, "model", "2 kv heads .* 3 devices"), (2, "x", "none called 'model'")],
)
def test_a_mesh_that_cannot_share_out_the_heads_is_refused(shape, axis, message):
    mesh = AbstractMesh((shape,), (axis,))
    with pytest.raises(ValueError, match=message):
        check_mesh(preset("tiny"), mesh)
