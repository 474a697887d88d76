"""How a model is spread over devices: tensor parallelism over kv heads.

Knows axes of arrays and one mesh axis. Does not know what the arrays are used for. Page
moves and attention touch each kv head by itself, so that only the output projections
of a layer communicate (Shoeybi et al., Megatron-LM, 2019).
"""

from collections.abc import Callable

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from cachedattn_jax.model.config import LlamaConfig
from cachedattn_jax.model.llama import LlamaParams

AXIS = "model"
POOL_SPEC = PartitionSpec(None, None, AXIS)
_HEADS_SPEC = PartitionSpec(None, None, AXIS)  # [batch, tokens, heads, head_dim]
_COLUMNS, _ROWS = PartitionSpec(None, AXIS), PartitionSpec(AXIS, None)
# A kernel is [inputs, outputs]; the outputs of qkv_proj go by kv head.
_KERNEL_SPECS = {
    "qkv_proj": _COLUMNS,
    "o_proj": _ROWS,
    "gate_proj": _COLUMNS,
    "up_proj": _COLUMNS,
    "down_proj": _ROWS,
}


def param_specs(params: LlamaParams) -> LlamaParams:
    """A partition spec for each weight; norms and the embedding are on every device."""

    def spec(path, _):
        names = [getattr(part, "key", getattr(part, "name", None)) for part in path]
        if names[0] == "lm_head":
            return _COLUMNS
        found = [_KERNEL_SPECS[name] for name in names if name in _KERNEL_SPECS]
        return found[0] if found else PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec, params)


def check_mesh(config: LlamaConfig, mesh: Mesh | AbstractMesh) -> None:
    """Raises ValueError where the mesh cannot share out the kv heads evenly."""
    devices = mesh.shape.get(AXIS)
    if devices is None:
        raise ValueError(f"the mesh has axes {mesh.axis_names}, none called {AXIS!r}")
    if config.num_kv_heads % devices:
        raise ValueError(
            f"{config.num_kv_heads} kv heads cannot be shared out over {devices} "
            "devices"
        )


def over_kv_heads(mesh: Mesh | None, attend: Callable) -> Callable:
    """`attend(query, key, value, pool, *where) -> (output, pool)`, each device on its
    own heads.

    Compilers cannot split a Pallas kernel by themselves: without this a sharded pool
    would be gathered on every device. `where` is on every device.
    """
    if mesh is None:
        return attend

    def attend_everywhere(query, key, value, pool, *where):
        return jax.shard_map(
            attend,
            mesh=mesh,
            in_specs=(*[_HEADS_SPEC] * 3, POOL_SPEC, *[PartitionSpec()] * len(where)),
            out_specs=(_HEADS_SPEC, POOL_SPEC),
            check_vma=False,
        )(query, key, value, pool, *where)

    return attend_everywhere
