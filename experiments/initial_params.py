"""Weights to begin the training of a narrow model with, so that it learns in minutes.

Knows weights. Does not know data or training. A model that continues "Qx ... Q" with
"x" needs a head that looks one byte back, and in the next layer one that finds where
the byte before was the one that stands here (Olsson et al., In-context learning and
induction heads, 2022). Left to themselves such heads had not formed after 0.7 million
bytes of training; here each of two layers begins with a rough one.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from cachedattn_jax.model.config import LlamaConfig
from cachedattn_jax.model.layers import INIT_STDDEV
from cachedattn_jax.model.llama import LlamaParams, init_params

# The first number of every embedding at the start, so that a head can ignore the rest.
_CONSTANT = 2.0
# Of the head that looks back: one byte gets nearly all of its weight.
_SHARPNESS = 2.0
# Of the head that finds: a match scores a few nats above noise.
_MATCH = 10.0
# Frequencies that turn by less than one radian over this many bytes are slow.
_REACH = 100


def initial_params(model: LlamaConfig, seed: int) -> LlamaParams:
    """Random weights scaled for a narrow model, with two heads in place."""
    params = init_params(model, seed)
    depth = (2 * model.num_layers) ** -0.5

    def scaled(path, x):
        if x.ndim < 2:
            return np.array(x)
        name = jax.tree_util.keystr(path)
        is_last = "o_proj" in name or "down_proj" in name
        scale = x.shape[0] ** -0.5 / INIT_STDDEV * (depth if is_last else 1.0)
        return np.array(x) * np.float32(scale)

    layers = jax.tree_util.tree_map_with_path(scaled, params.layers)
    _look_back(model, layers[0]["attention"])
    if model.num_layers > 1:
        _find(model, layers[0]["attention"], layers[1]["attention"])
    embedding = np.array(params.embedding) * np.float32(0.5 / INIT_STDDEV)
    embedding[:, 0] = _CONSTANT
    layers = jax.tree.map(jnp.asarray, layers)
    return dataclasses.replace(params, layers=layers, embedding=jnp.asarray(embedding))


def _look_back(model: LlamaConfig, attention: dict) -> None:
    """Makes head 0 look one byte back.

    Its scores are sums of cos((distance - 1) * frequency) over the fast frequencies.
    """
    half = model.head_dim // 2
    fast = model.inverse_frequencies()[: half // 4]
    for name, angles in (("q_proj", 0 * fast), ("k_proj", fast)):
        kernel = attention[name]["kernel"]
        kernel[:, : model.head_dim] = 0.0
        kernel[0, : len(fast)] = _SHARPNESS * np.cos(angles)
        kernel[0, half : half + len(fast)] = _SHARPNESS * np.sin(angles)


def _find(model: LlamaConfig, before: dict, attention: dict) -> None:
    """Makes head 0 look for bytes that come after one like the byte that asks.

    The query projects a byte as the head before projects the byte it looked at; the key
    reads what that head wrote. Fast frequencies would blur the match and stay out.
    """
    size, half = model.head_dim, model.head_dim // 2
    is_slow = np.tile(model.inverse_frequencies() < 1 / _REACH, 2)[:size]
    assert is_slow.shape == (2 * half,)
    # What all bytes have in common would count as half a match.
    before["v_proj"]["kernel"][0, :size] = 0.0
    written = before["o_proj"]["kernel"][:size]
    attention["q_proj"]["kernel"][:, :size] = (
        before["v_proj"]["kernel"][:, :size] * is_slow
    )
    attention["k_proj"]["kernel"][:, :size] = _MATCH * written.T * is_slow
