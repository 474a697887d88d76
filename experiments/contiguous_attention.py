"""Times a library's attention over caches without pages: what paging is held against.

Knows cuDNN through jax, on CPU XLA in its place. Does not know pages or rotations: the
keys count as rotated already.
"""

import functools

import jax
import jax.numpy as jnp

from experiments.device_ceilings import best_s


def decode_contiguous(config, page_tokens, backend, interpret, seed, batch, context):
    """As `kernel_speed` times decode; `page_tokens` and `backend` change nothing."""
    seconds = _seconds(config, interpret, seed, batch, 1, context, calls=64)
    num_bytes = batch * context * 2 * config.num_kv_heads * config.head_dim * 2
    return {"seconds": seconds, "bytes_s": num_bytes / seconds}


def prefill_contiguous(
    config, page_tokens, backend, interpret, seed, batch, new, history
):
    """As `kernel_speed` times prefill, without a history."""
    if history:
        raise NotImplementedError("the causal mask of cuDNN takes no offset")
    seconds = _seconds(config, interpret, seed, batch, new, new, calls=16)
    pairs = batch * new * (new + 1) / 2
    flops = 4 * config.num_heads * config.head_dim * pairs
    return {"seconds": seconds, "flops_s": flops / seconds}


def _seconds(config, interpret, seed, batch, new, context, *, calls) -> float:
    """Of a call whose query is the output of the one before."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shape = (batch, new, config.num_heads, config.head_dim)
    query = jax.random.normal(keys[0], shape, jnp.bfloat16)
    shape = (batch, context, config.num_kv_heads, config.head_dim)
    key, value = (jax.random.normal(k, shape, jnp.bfloat16) for k in keys[1:])
    attend = functools.partial(
        jax.nn.dot_product_attention,
        is_causal=new > 1,
        implementation="xla" if interpret else "cudnn",
    )

    @jax.jit
    def chain(query, key, value):
        step = lambda _, q: attend(q, key, value)  # noqa: E731
        return jax.lax.fori_loop(0, calls, step, query)

    try:
        return best_s(chain, query, key, value, calls=1) / calls
    except (RuntimeError, ValueError) as error:
        raise NotImplementedError(f"cuDNN: {str(error).splitlines()[0]}") from error
