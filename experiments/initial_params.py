"""Weights to begin the training of a narrow model with, so that it learns in minutes.

Knows weights. Does not know data or training. A model that continues "Qx ... Q" with
"x" needs a head that looks one byte back, and in the next layer one that finds where
the byte before was the one that stands here (Olsson et al., In-context learning and
induction heads, 2022). Here each of two layers begins with such a head, and what one
writes for the other has numbers of the hidden state to itself. The model of
`configs/truncation_quality.gin`, after 0.3 million bytes of which an eighth were lines,
found 53 % of 16 lines from here, and 2 % where heads were left to form by themselves;
held-out text took 2.12 and 2.38 nats a byte.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from cachedattn_jax.model.config import LlamaConfig
from cachedattn_jax.model.layers import INIT_STDDEV
from cachedattn_jax.model.llama import LlamaParams, init_params

_EMBEDDING_STDDEV = 0.5
# The first number of every embedding, so that a head can ignore the rest.
_CONSTANT = 2.0
# Of the head that looks back: one byte gets nearly all of its weight.
_SHARPNESS = 2.0
# Of the head that finds: a match scores some 8 nats above the average.
_MATCH = 1.5


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

    params = jax.tree_util.tree_map_with_path(scaled, params)
    size = np.float32(_EMBEDDING_STDDEV * model.vocab_size**0.5)
    params = dataclasses.replace(params, embedding=params.embedding * size)
    if model.num_layers > 1:
        _place_heads(model, params)
    return jax.tree.map(jnp.asarray, params)


def _place_heads(model: LlamaConfig, params: LlamaParams) -> None:
    """Makes head 0 of the first layer look one byte back, and head 0 of the second find
    the bytes that come after one like the byte that asks.

    The first head's scores are sums of cos((distance - 1) * frequency) over the fast
    frequencies. What it writes about the byte it sees are numbers 1, 2, ... of the
    hidden state; the second compares them with the same numbers of its own byte. Only
    the slow frequencies take part in that: the fast ones would blur the match.
    """
    half = model.head_dim // 2
    frequencies = model.inverse_frequencies()
    slow = np.flatnonzero(np.tile(frequencies < 1 / model.window, 2))
    note = 1 + np.arange(len(slow))
    embedding: np.ndarray = params.embedding  # pyright: ignore[reportAssignmentType]
    embedding[:, 0], embedding[:, note] = _CONSTANT, 0.0
    before, after = (layer["attention"] for layer in params.layers[:2])

    fast = frequencies[: max(1, half // 4)]
    query, key, seen = _head_0(model, before["qkv_proj"]["kernel"])
    for kernel, angles in ((query, 0 * fast), (key, fast)):
        kernel[:] = 0.0
        kernel[0, : len(fast)] = _SHARPNESS * np.cos(angles)
        kernel[0, half : half + len(fast)] = _SHARPNESS * np.sin(angles)
    seen[: len(note) + 1] = 0.0
    before["o_proj"]["kernel"][:, note] = 0.0
    params.layers[0]["mlp"]["down_proj"]["kernel"][:, note] = 0.0
    before["o_proj"]["kernel"][: model.head_dim] = 0.0
    before["o_proj"]["kernel"][slow, note] = 1.0

    query, key, _ = _head_0(model, after["qkv_proj"]["kernel"])
    query[:], key[:] = 0.0, 0.0
    query[:, slow] = _MATCH * seen[:, slow]
    key[note, slow] = _MATCH


def _head_0(model: LlamaConfig, kernel: np.ndarray) -> tuple[np.ndarray, ...]:
    """Views of the columns of query head 0, its key and its value."""
    ends = model.head_dim * (model.num_heads // model.num_kv_heads + np.arange(3))
    query, (_, key, value, _) = kernel[:, : model.head_dim], np.split(kernel, ends, 1)
    return query, key, value
