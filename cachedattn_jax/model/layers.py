"""The layers of a Llama in Flax NNX.

Knows weights and hidden states. Does not know positions, pages or caches: where keys
and values come from is the `attend` function that a caller hands to a layer.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Shaped

from cachedattn_jax.model.config import LlamaConfig

# attend(query [..., heads, D], key [..., kv_heads, D], value [..., kv_heads, D])
# -> [..., heads, D], with keys and queries not yet rotated.
Attend = Callable[[Array, Array, Array], Array]

INIT_STDDEV = 0.02


class RMSNorm(nnx.Module):
    """Divides by the root mean square over the last axis, then scales."""

    def __init__(self, config: LlamaConfig):
        self.eps = config.norm_eps
        self.scale = nnx.Param(jnp.ones(config.hidden_size, config.dtype))

    def __call__(self, x: Float[Array, "*rows hidden"]) -> Float[Array, "*rows hidden"]:
        return rms_normalise(x, self.scale[...], self.eps)


class Attention(nnx.Module):
    """Projections around an attention that the caller provides."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.num_kv_heads, self.head_dim = config.num_kv_heads, config.head_dim
        query_size = config.num_heads * config.head_dim
        qkv_size = query_size + 2 * config.num_kv_heads * config.head_dim
        # One product, of weights side by side (`join_qkv`): of three XLA on CUDA makes
        # one by itself, but joins the weights at every call. H200, llama-3-8b, a layer
        # of 1,024 tokens: 106 us so, 71 us with one kernel.
        self.qkv_proj = _linear(config, config.hidden_size, qkv_size, rngs)
        self.o_proj = _linear(config, query_size, config.hidden_size, rngs)

    def __call__(
        self, x: Float[Array, "*rows hidden"], attend: Attend
    ) -> Float[Array, "*rows hidden"]:
        # Without the barriers XLA on TPU gives the products the layouts that attention
        # wants, and copies the weights into a matching one at every call.
        qkv = jax.lax.optimization_barrier(self.qkv_proj(x))
        rows = x.shape[:-1]
        # Heads are taken apart after the split: with an axis of their own before it a
        # layer of llama-2-13b moved 8 % more bytes on TPU.
        by_kv_head = qkv.reshape(*rows, self.num_kv_heads, -1)
        width = by_kv_head.shape[-1]
        ends = width - 2 * self.head_dim, width - self.head_dim
        parts = jnp.split(by_kv_head, ends, axis=-1)
        query, key, value = (y.reshape(*rows, -1, self.head_dim) for y in parts)
        output = attend(query, key, value).reshape(*rows, -1)
        return self.o_proj(jax.lax.optimization_barrier(output))


class MLP(nnx.Module):
    """The SwiGLU feed-forward network (Shazeer, GLU Variants, 2020)."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        hidden, intermediate = config.hidden_size, config.intermediate_size
        self.gate_proj = _linear(config, hidden, intermediate, rngs)
        self.up_proj = _linear(config, hidden, intermediate, rngs)
        self.down_proj = _linear(config, intermediate, hidden, rngs)

    def __call__(self, x: Float[Array, "*rows hidden"]) -> Float[Array, "*rows hidden"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    """One pre-norm transformer layer; it knows no positions."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.input_norm = RMSNorm(config)
        self.attention = Attention(config, rngs=rngs)
        self.post_attention_norm = RMSNorm(config)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "*rows hidden"], attend: Attend
    ) -> Float[Array, "*rows hidden"]:
        x = x + self.attention(self.input_norm(x), attend)
        return x + self.mlp(self.post_attention_norm(x))


def join_qkv(
    query: Shaped[Array, "hidden queries"],
    key: Shaped[Array, "hidden keys"],
    value: Shaped[Array, "hidden values"],
    num_kv_heads: int,
) -> Shaped[Array, "hidden queries+keys+values"]:
    """The kernel of `Attention.qkv_proj` out of three whose columns go by head.

    Its columns go by kv head, so that a share of them is a share of the kv heads:

        | queries of kv head 0's group | its key | its value | of kv head 1's group ...
    """
    kernels = (x.reshape(len(x), num_kv_heads, -1) for x in (query, key, value))
    return jnp.concatenate(tuple(kernels), axis=-1).reshape(len(query), -1)


def rms_normalise(
    x: Float[Array, "*rows hidden"], scale: Float[Array, " hidden"], eps: float
) -> Float[Array, "*rows hidden"]:
    """The formula of `RMSNorm`, in float32; keeps the dtype of `x`."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    scaled = wide * jax.lax.rsqrt(mean_square + eps) * scale.astype(jnp.float32)
    return scaled.astype(x.dtype)


def _linear(
    config: LlamaConfig, inputs: int, outputs: int, rngs: nnx.Rngs
) -> nnx.Linear:
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=False,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.dtype),
        kernel_init=nnx.initializers.normal(INIT_STDDEV),
        rngs=rngs,
    )
