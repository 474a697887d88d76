"""The programs that a server runs, at the shapes of real models, without their arrays.

Knows shapes and the least work a program can be done with. Does not know who compiles
it, or where.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cachedattn_jax.model.config import LlamaConfig, preset
from cachedattn_jax.model.llama import abstract_params
from cachedattn_jax.model.paged import decode_step, prefill_group
from cachedattn_jax.model.sharding import AXIS, POOL_SPEC, check_mesh, param_specs
from pallas_kernels.backends import Kernels
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.page_copy import extract_pages, install_pages
from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.rope import RopeTables

DECODE_BATCH = 16
CHUNK_TOKENS = 2048  # new tokens of a prefill call
RUN_PAGES = 16  # pages moved in one call
# A pool of a compiled program holds so many contexts, and so many bytes on each device
# that a copy of it shows.
POOL_SEQUENCES, POOL_BYTES = 6, 160 << 20


@dataclass(frozen=True, kw_only=True)
class Program:
    """One program to compile.

    Attributes:
        arguments: shapes with shardings.
        donated: places of the arguments that are updated in place.
        min_bytes, min_flops: what it must at least move through device memory and
            compute, over all devices.
        pool_bytes: one layer group's pool on one device; temporaries as large would
            mean that a pool was copied.
        activation_bytes: the largest intermediates that the model itself has at once.
    """

    name: str
    mesh: Mesh
    function: Callable
    arguments: tuple
    donated: tuple[int, ...] = ()
    min_bytes: float
    min_flops: float
    pool_bytes: int
    activation_bytes: int


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


def kernel_programs(at: Shapes) -> Iterator[Program]:
    """Attention of one layer and page moves, on one device."""
    model, heads = at.model, at.model.num_heads
    kv_bytes = DECODE_BATCH * at.context * at.token_bytes
    query = at.array((DECODE_BATCH, heads, model.head_dim), model.dtype)
    yield Program(
        name=f"decode_attention, page {at.page_tokens}",
        mesh=at.mesh,
        function=functools.partial(
            decode_attention, layer=0, backend=at.kernels.decode
        ),
        arguments=(
            query,
            at.pool(),
            at.page_tables(DECODE_BATCH),
            at.counts(DECODE_BATCH),
            at.rope(),
        ),
        min_bytes=kv_bytes + 2 * query.size * at.item_bytes,
        min_flops=4 * DECODE_BATCH * heads * model.head_dim * at.context,
        pool_bytes=at.pool_bytes,
        activation_bytes=_decode_bytes(at),
    )
    query = at.array((1, CHUNK_TOKENS, heads, model.head_dim), model.dtype)
    yield Program(
        name=f"prefill_attention, page {at.page_tokens}",
        mesh=at.mesh,
        function=functools.partial(
            prefill_attention,
            layer=0,
            has_history=at.kernels.prefill != "cudnn",
            backend=at.kernels.prefill,
        ),
        arguments=(
            query,
            at.pool(),
            at.page_tables(1),
            at.counts(1),
            at.counts(1),
            at.rope(),
        ),
        min_bytes=at.context * at.token_bytes + 2 * query.size * at.item_bytes,
        min_flops=_prefill_flops(at),
        pool_bytes=at.pool_bytes,
        activation_bytes=_activation_bytes(at),
    )
    pool = at.pool()
    pages = at.array((RUN_PAGES, *pool.shape[1:]), pool.dtype, POOL_SPEC)
    moved = 2 * pages.size * at.item_bytes  # read and written
    yield Program(
        name=f"install_pages, page {at.page_tokens}",
        mesh=at.mesh,
        function=install_pages,
        arguments=(pool, pages, at.counts(RUN_PAGES)),
        donated=(0,),
        min_bytes=moved,
        min_flops=0,
        pool_bytes=at.pool_bytes,
        activation_bytes=moved // 2,
    )
    yield Program(
        name=f"extract_pages, page {at.page_tokens}",
        mesh=at.mesh,
        function=functools.partial(extract_pages, backend=at.kernels.decode),
        arguments=(pool, at.counts(RUN_PAGES)),
        min_bytes=moved,
        min_flops=0,
        pool_bytes=at.pool_bytes,
        activation_bytes=moved // 2,
    )


def model_programs(at: Shapes) -> Iterator[Program]:
    """A layer's prefill of `CHUNK_TOKENS` at the end of a context, and a decode step of
    the whole model.
    """
    model, params = at.model, at.params()
    layer_weights = _layer_weights(model)
    fresh_bytes = CHUNK_TOKENS * at.token_bytes
    hidden_bytes = 2 * CHUNK_TOKENS * model.hidden_size * at.item_bytes
    yield Program(
        name="prefill_group",
        mesh=at.mesh,
        function=functools.partial(
            prefill_group,
            model,
            has_history=at.kernels.prefill != "cudnn",
            kernels=at.kernels,
            mesh=at.shared_mesh,
        ),
        arguments=(
            params.layers[:1],
            at.array((1, CHUNK_TOKENS, model.hidden_size), model.dtype),
            at.pool(),
            at.page_tables(1),
            at.counts(1),
            at.counts(1),
            at.rope(),
        ),
        donated=(2,),
        min_bytes=layer_weights * at.item_bytes
        + at.context * at.token_bytes
        + fresh_bytes
        + hidden_bytes,
        min_flops=2 * CHUNK_TOKENS * layer_weights + _prefill_flops(at),
        pool_bytes=at.pool_bytes,
        activation_bytes=_activation_bytes(at),
    )
    weights = model.num_layers * layer_weights + model.vocab_size * model.hidden_size
    kv_bytes = DECODE_BATCH * at.context * at.token_bytes * model.num_layers
    attention_flops = 4 * DECODE_BATCH * model.num_heads * model.head_dim * at.context
    yield Program(
        name="decode_step",
        mesh=at.mesh,
        function=functools.partial(
            decode_step, model, kernels=at.kernels, mesh=at.shared_mesh
        ),
        arguments=(
            params,
            at.counts(DECODE_BATCH),
            [at.pool() for _ in range(model.num_layers)],
            at.page_tables(DECODE_BATCH),
            at.counts(DECODE_BATCH),
            at.rope(),
        ),
        donated=(2,),
        min_bytes=weights * at.item_bytes + kv_bytes,
        min_flops=2 * DECODE_BATCH * weights + attention_flops * model.num_layers,
        pool_bytes=at.pool_bytes,
        activation_bytes=_decode_bytes(at),
    )


def _layer_weights(model: LlamaConfig) -> int:
    """Numbers in the matrices of one layer."""
    heads = 2 * model.num_heads + 2 * model.num_kv_heads
    attention = model.hidden_size * heads * model.head_dim
    return attention + 3 * model.hidden_size * model.intermediate_size


def _prefill_flops(at: Shapes) -> float:
    """Attention of the last `CHUNK_TOKENS` of a context over all of it, causal."""
    history = at.context - CHUNK_TOKENS
    seen = CHUNK_TOKENS * history + CHUNK_TOKENS * (CHUNK_TOKENS + 1) / 2
    return 4 * at.model.num_heads * at.model.head_dim * seen


def _decode_bytes(at: Shapes) -> int:
    """Logits, and the pages that a step adds tokens to, of the few layers that the
    compiler has under way at once. Several devices add up two products a layer, and
    XLA gives each sum, and one copy of it, a buffer of its own.
    """
    logits = DECODE_BATCH * at.model.vocab_size * 4
    pages = DECODE_BATCH * at.page_tokens * at.token_bytes // at.devices
    hidden = DECODE_BATCH * at.model.hidden_size * at.item_bytes
    sums = 3 * at.model.num_layers * hidden if at.devices > 1 else 0
    return logits + 4 * pages + sums


def _activation_bytes(at: Shapes) -> int:
    """What a layer has at once before the product of its feed-forward halves: residual,
    normalised input and both halves; and the pages that the call appends.
    """
    wide = 2 * at.model.intermediate_size // at.devices + 2 * at.model.hidden_size
    pages = 4 * CHUNK_TOKENS * at.token_bytes // at.devices
    return CHUNK_TOKENS * wide * at.item_bytes + pages
