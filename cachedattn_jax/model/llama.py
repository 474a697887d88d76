"""The Llama: pure functions over its weights as plain pytrees, and a dense reference.

Knows layers and weights. Does not know pages or caches: keys and values go through the
`attend` function that a caller hands to each layer. Only `Llama.__call__`, the dense
reference, attends by itself.
"""

import functools
import hashlib
from dataclasses import dataclass, replace
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped, UInt32

from cachedattn_jax.model.config import LlamaConfig
from cachedattn_jax.model.layers import (
    INIT_STDDEV,
    Attend,
    DecoderLayer,
    RMSNorm,
    rms_normalise,
)
from pallas_kernels.rope import rotate


class Llama(nnx.Module):
    """The whole model; calling it is the dense reference that tests compare with."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        normal = nnx.initializers.normal(INIT_STDDEV)
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(normal(rngs.params(), shape, config.dtype))
        self.layers = nnx.List(
            [DecoderLayer(config, rngs=rngs) for _ in range(config.num_layers)]
        )
        self.final_norm = RMSNorm(config)
        if config.tie_embeddings:
            self.lm_head = None
        else:
            head = normal(rngs.params(), shape[::-1], config.dtype)
            self.lm_head = nnx.Param(head)

    def __call__(
        self, tokens: Int[Array, "batch seq"]
    ) -> Float[Array, "batch seq vocab"]:
        """Float32 logits with absolute positions and a causal mask."""
        ends = _ends_of(self)
        attend = _causal_attention(self.config, tokens.shape[1])
        x = embed(self.config, ends, tokens)
        for layer in self.layers:
            x = layer(x, attend)
        return unembed(self.config, ends, x)


# A pytree of this shape also holds shapes or shardings where the arrays would be.
@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LlamaParams:
    """The weights as a pytree of plain arrays.

    Attributes:
        layers: one nested dict per layer, by module and parameter name; a kernel is
            [inputs, outputs].
        lm_head: None when the embedding is tied.
    """

    embedding: Shaped[Array, "vocab hidden"]
    layers: tuple[dict, ...]
    final_norm: Shaped[Array, " hidden"]
    lm_head: Shaped[Array, "hidden vocab"] | None


def init_params(config: LlamaConfig, seed: int) -> LlamaParams:
    """Random weights, the same ones for the same seed."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"{seed=} must lie in 0..{2**32 - 1}")
    keys = jax.random.split(jax.random.key(np.uint32(seed)), config.num_layers + 1)
    # One small program a layer: one program for all 8 layers of "small" took 7-11 s to
    # compile on 2 CPU cores.
    layers = tuple(_init_layer(config, key) for key in keys[1:])
    return replace(_init_ends(config, keys[0]), layers=layers)


def abstract_params(config: LlamaConfig) -> LlamaParams:
    """Shapes and dtypes of the weights, without the weights."""
    key = jax.eval_shape(jax.random.key, np.uint32(0))
    layer = jax.eval_shape(functools.partial(_init_layer, config), key)
    ends = jax.eval_shape(functools.partial(_init_ends, config), key)
    return replace(ends, layers=(layer,) * config.num_layers)


def params_of(model: Llama) -> LlamaParams:
    """The weights of a model, split off its graph."""
    ends = _ends_of(model)
    layers = [nnx.to_pure_dict(nnx.state(layer)) for layer in model.layers]
    return LlamaParams(
        embedding=ends.embedding,
        layers=tuple(layers),
        final_norm=ends.final_norm,
        lm_head=ends.lm_head,
    )


def model_of(config: LlamaConfig, params: LlamaParams) -> Llama:
    """The model with these weights."""
    state = {
        "embedding": params.embedding,
        "layers": dict(enumerate(params.layers)),
        "final_norm": {"scale": params.final_norm},
    }
    if params.lm_head is not None:
        state["lm_head"] = params.lm_head
    return nnx.merge(_model_graph(config), nnx.State(state))


def embed(
    config: LlamaConfig,
    params: LlamaParams,
    tokens: Int[Array, "*rows"],
) -> Float[Array, "*rows {config.hidden_size}"]:
    """The hidden state before the first layer; reads only the ends of `params`."""
    return params.embedding.at[tokens].get(mode="clip")


def apply_layer(
    config: LlamaConfig,
    layer: dict,
    x: Float[Array, "*rows {config.hidden_size}"],
    attend: Attend,
) -> Float[Array, "*rows {config.hidden_size}"]:
    """One layer of the model, given its entry in `LlamaParams.layers`."""
    return nnx.merge(_layer_graph(config), nnx.State(layer))(x, attend)


def unembed(
    config: LlamaConfig,
    params: LlamaParams,
    x: Float[Array, "*rows {config.hidden_size}"],
) -> Float[Array, "*rows {config.vocab_size}"]:
    """Float32 logits after the last layer; reads only the ends of `params`."""
    x = rms_normalise(x, params.final_norm, config.norm_eps)
    head = params.embedding.T if params.lm_head is None else params.lm_head
    return jnp.matmul(x, head, preferred_element_type=jnp.float32)


def weights_digest(params: LlamaParams) -> str:
    """Identity of the weights: a hash over the path, shape, dtype and bits of each.

    The bits are summed up where they are, so that no weight leaves its device, and in
    integers, so that the sum does not depend on how they are sharded.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    checksums = jax.device_get([_checksum(leaf) for _, leaf in leaves])
    digest = hashlib.blake2b(digest_size=16)
    for (path, leaf), checksum in zip(leaves, checksums, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        digest.update(f"{name} {leaf.shape} {leaf.dtype.name} ".encode())
        digest.update(checksum.astype("<u4").tobytes())
    return digest.hexdigest()


@jax.jit
def _checksum(x: Shaped[Array, "..."]) -> UInt32[Array, " lanes=2"]:
    """Order-sensitive sums of the bits, modulo 2**32, in two independent lanes."""
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    # The flat index, spelt so that a sharded array is not gathered for it.
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        index = index * np.uint32(size) + place
    return jnp.stack(
        [
            jnp.sum(_mix(bits ^ _mix(index + np.uint32(salt))), dtype=jnp.uint32)
            for salt in (0x9E3779B9, 0x7F4A7C15)
        ]
    )


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The finaliser of MurmurHash3: every input bit changes half the output bits."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


@functools.partial(jax.jit, static_argnums=0)
def _init_layer(config: LlamaConfig, key: PRNGKeyArray) -> dict:
    layer = DecoderLayer(config, rngs=nnx.Rngs(params=key))
    return nnx.to_pure_dict(nnx.state(layer))


@functools.partial(jax.jit, static_argnums=0)
def _init_ends(config: LlamaConfig, key: PRNGKeyArray) -> LlamaParams:
    # The one layer is dead code to the compiler.
    model = Llama(replace(config, num_layers=1), rngs=nnx.Rngs(params=key))
    return _ends_of(model)


@functools.lru_cache(maxsize=16)
def _model_graph(config: LlamaConfig) -> nnx.GraphDef:
    # nnx.merge of a split model costs 10-20 us; nnx.jit would cost 300 us a call.
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(params=0)))
    return nnx.split(model)[0]


@functools.lru_cache(maxsize=16)
def _layer_graph(config: LlamaConfig) -> nnx.GraphDef:
    layer = nnx.eval_shape(lambda: DecoderLayer(config, rngs=nnx.Rngs(params=0)))
    return nnx.split(layer)[0]


def _ends_of(model: Llama) -> LlamaParams:
    """The weights outside the layers."""
    head = model.lm_head
    return LlamaParams(
        embedding=model.embedding[...],
        layers=(),
        final_norm=model.final_norm.scale[...],
        lm_head=None if head is None else head[...],
    )


def _causal_attention(config: LlamaConfig, num_tokens: int) -> Attend:
    """Attention over [batch, seq, heads, head_dim] with absolute positions, written
    out: softmax(q k / sqrt(head_dim)) v, where token i sees tokens 0..i.
    """
    angles = np.arange(num_tokens)[:, None] * config.inverse_frequencies()
    cos = jnp.asarray(np.cos(angles), jnp.float32)[:, None]
    sin = jnp.asarray(np.sin(angles), jnp.float32)[:, None]
    is_visible = np.tril(np.ones((num_tokens, num_tokens), bool))

    def attend(query, key, value):
        groups = query.shape[-2] // key.shape[-2]
        query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
        query = rotate(query, cos, sin) * config.head_dim**-0.5
        key = jnp.repeat(rotate(key, cos, sin), groups, axis=-2)
        value = jnp.repeat(value, groups, axis=-2)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key)
        weights = jax.nn.softmax(jnp.where(is_visible, scores, -jnp.inf), axis=-1)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, value).astype(config.dtype)

    return attend
