"""The programs that a server runs, at the shapes of real models, without their arrays.

Knows shapes and the least work a program can be done with. Does not know who compiles
it, or where.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jax.sharding import Mesh

from cachedattn_jax.model.config import LlamaConfig
from cachedattn_jax.model.paged import decode_step, prefill_group
from cachedattn_jax.model.sharding import POOL_SPEC
from experiments.shapes import Shapes
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.page_copy import extract_pages, install_pages
from pallas_kernels.prefill_attention import prefill_attention

DECODE_BATCH = 16
CHUNK_TOKENS = 2048  # new tokens of a prefill call
RUN_PAGES = 16  # pages moved in one call


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
