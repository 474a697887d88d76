"""The answer after truncations: dense attention over the kept keys and values.

Independent of pages, pools and stores: keys and values of every token lie in one array
a layer, unrotated, in the order they were computed. A truncation takes rows out. The
rows that are left are rotated anew for every token, by where they stand then.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cachedattn_jax.model.llama import apply_layer, embed, unembed
from tests.engines import tiny_model


class DenseCache:
    """Keys and values of one conversation, as the model sees it.

    Args:
        is_naive: keys stay at the positions at which they were computed.
    """

    def __init__(self, is_naive: bool = False) -> None:
        self.is_naive, self.places = is_naive, np.zeros(0, np.float32)
        config, _ = tiny_model()
        shape = (config.num_layers, 0, config.num_kv_heads, config.head_dim)
        self.key, self.value = np.zeros(shape, np.float32), np.zeros(shape, np.float32)

    @property
    def length(self) -> int:
        return self.key.shape[1]

    def drop(self, positions) -> None:
        self.key = np.delete(self.key, positions, axis=1)
        self.value = np.delete(self.value, positions, axis=1)
        self.places = np.delete(self.places, positions)
        if not self.is_naive:
            self.places = np.arange(self.length, dtype=np.float32)

    def feed(self, token: int) -> np.ndarray:
        """Computes one token; its logits."""
        config, _ = tiny_model()
        room = config.window + 1 - self.length
        padding = ((0, 0), (0, room), (0, 0), (0, 0))
        logits, key, value = _feed(
            np.int32(token),
            np.pad(self.key, padding),
            np.pad(self.value, padding),
            np.pad(self.places, (0, room)),
            np.int32(self.length),
        )
        self.places = np.append(self.places, np.float32(self.length))
        self.key = np.concatenate([self.key, np.asarray(key)], axis=1)
        self.value = np.concatenate([self.value, np.asarray(value)], axis=1)
        return np.asarray(logits)


def _rotate(x, position):
    """R(position) x, with the half-split pairing written out."""
    config, _ = tiny_model()
    angle = position[:, None] * jnp.asarray(config.inverse_frequencies(), jnp.float32)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


@functools.partial(jax.jit)
def _feed(token, keys, values, positions, length):
    config, params = tiny_model()
    x = embed(config, params, token[None])
    places = jnp.arange(keys.shape[1])
    positions = jnp.where(places == length, length.astype(jnp.float32), positions)
    fresh_keys, fresh_values = [], []
    for layer, weights in enumerate(params.layers):

        def attend(query, key, value, layer=layer):
            fresh_keys.append(key)
            fresh_values.append(value)
            is_new = (places == length)[:, None, None]
            all_keys = jnp.where(is_new, key, keys[layer])
            all_values = jnp.where(is_new, value, values[layer])
            rotated = _rotate(all_keys, positions)
            here = jnp.broadcast_to(length, (1,)).astype(jnp.float32)
            groups = config.num_heads // config.num_kv_heads
            score = jnp.einsum(
                "qhd,khd->hqk", _rotate(query, here), jnp.repeat(rotated, groups, 1)
            )
            score = jnp.where(places <= length, score * config.head_dim**-0.5, -jnp.inf)
            weight = jax.nn.softmax(score, axis=-1)
            return jnp.einsum("hqk,khd->qhd", weight, jnp.repeat(all_values, groups, 1))

        x = apply_layer(config, weights, x, attend)
    return unembed(config, params, x)[0], jnp.stack(fresh_keys), jnp.stack(fresh_values)


def replies(
    truncations, conversation, turns, is_naive=False
) -> list[tuple[list[int], list[float]]]:
    """Greedy replies, with margins, of a conversation whose truncations are known.

    Args:
        truncations: (tokens that had keys and values, positions dropped), in order.
        conversation: all tokens, as far as they are known beforehand.
        turns: (where a reply begins, where it ends) of each.
    """
    cache, left, found = DenseCache(is_naive), list(truncations), []
    logits = np.zeros(0)
    after = {}
    for index, token in enumerate(conversation):
        while left and left[0][0] == index:
            cache.drop(left.pop(0)[1])
        logits = cache.feed(token)
        after[index] = logits
    for begins, ends in turns:
        chosen = [after[index - 1] for index in range(begins, ends)]
        best = [np.sort(logits)[-2:] for logits in chosen]
        found.append(
            (
                [int(np.argmax(logits)) for logits in chosen],
                [float(pair[1] - pair[0]) for pair in best],
            )
        )
    return found
