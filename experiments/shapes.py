"""A model at the sizes of a server: the shapes of its arrays, and how they are sharded.

Knows pages and devices. Does not know which programs use them.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cachedattn_jax.model.config import LlamaConfig, preset
from cachedattn_jax.model.llama import abstract_params
from cachedattn_jax.model.sharding import AXIS, POOL_SPEC, check_mesh, param_specs
from pallas_kernels.backends import Kernels
from pallas_kernels.rope import RopeTables

# A pool of a compiled program holds so many contexts, and so many bytes on each device
# that a copy of it shows.
POOL_SEQUENCES, POOL_BYTES = 6, 160 << 20


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """A model, its pages and the devices that share its kv heads.

    Attributes:
        context: tokens that every sequence has behind it.
    """

    model: LlamaConfig
    page_tokens: int
    mesh: Mesh
    kernels: Kernels
    context: int

    def __post_init__(self):
        check_mesh(self.model, self.mesh)

    @property
    def devices(self) -> int:
        return self.mesh.size

    @property
    def shared_mesh(self) -> Mesh | None:
        return self.mesh if self.devices > 1 else None

    @property
    def pages(self) -> int:
        return -(-self.context // self.page_tokens)

    @property
    def item_bytes(self) -> int:
        return jnp.dtype(self.model.dtype).itemsize

    @property
    def token_bytes(self) -> int:
        """K and V of one token in one layer."""
        return 2 * self.model.num_kv_heads * self.model.head_dim * self.item_bytes

    def array(self, shape, dtype, spec=PartitionSpec()) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(self.mesh, spec)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    @property
    def slots(self) -> int:
        page_bytes = self.page_tokens * self.token_bytes // self.devices
        return max(POOL_SEQUENCES * self.pages, POOL_BYTES // page_bytes)

    def pool(self) -> jax.ShapeDtypeStruct:
        shape = (self.slots, 1, self.model.num_kv_heads, 2, self.page_tokens)
        return self.array((*shape, self.model.head_dim), self.model.dtype, POOL_SPEC)

    @property
    def pool_bytes(self) -> int:
        """One layer's pool on one device."""
        return self.slots * self.page_tokens * self.token_bytes // self.devices

    def rope(self) -> Any:
        """`RopeTables` of shapes."""
        half = self.model.head_dim // 2
        offset = self.array((self.page_tokens, half), jnp.float32)
        page = self.array((self.pages, half), jnp.float32)
        tables: Any = RopeTables
        return tables(
            offset_cos=offset, offset_sin=offset, page_cos=page, page_sin=page
        )

    def page_tables(self, batch: int) -> jax.ShapeDtypeStruct:
        return self.array((batch, self.pages), jnp.int32)

    def counts(self, batch: int) -> jax.ShapeDtypeStruct:
        return self.array((batch,), jnp.int32)

    def params(self):
        abstract = abstract_params(self.model)
        return jax.tree.map(
            lambda x, spec: self.array(x.shape, x.dtype, spec),
            abstract,
            param_specs(abstract),
        )


def shapes(
    model: str, device_mesh: Mesh, kernels: Kernels, *, page_tokens: int, **overrides
) -> Shapes:
    """A preset at the length of its window, at most 8K tokens."""
    config = preset(model, dtype="bfloat16")
    config = replace(config, window=min(config.window, 8192), **overrides)
    return Shapes(
        model=config,
        page_tokens=page_tokens,
        mesh=device_mesh,
        kernels=kernels,
        context=config.window,
    )


def mesh_of(devices) -> Mesh:
    """A mesh whose one axis shares out the kv heads."""
    return Mesh(devices, (AXIS,), axis_types=(AxisType.Auto,))
