"""What the bytes of a page mean: shape, dtype, rotation and the weights that made them.

Knows sizes, byte offsets and the digest that keeps pages of different models apart.
Does not know keys, tiers or arrays on a device.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FORMAT_VERSION = 1

_ITEM_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The KV cache of one model, cut into pages.

    Attributes:
        weights: identity of the weights, as `model.llama.weights_digest` gives it.
        rope: description of the rotation whose offsets are baked into stored keys.
        norm_eps: of the model; like the weights it shapes every value.
        layers_per_group: consecutive layers that move together; it changes how pages
            travel, never what they hold, so it is not part of the digest.
    """

    num_layers: int
    layers_per_group: int
    num_kv_heads: int
    head_dim: int
    page_tokens: int
    dtype: str
    rope: str
    weights: str
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.page_tokens < 1:
            raise ValueError(f"page_tokens={self.page_tokens} must be at least 1")
        if self.layers_per_group < 1 or self.num_layers % self.layers_per_group:
            raise ValueError(
                f"layers_per_group={self.layers_per_group} must divide the"
                f" {self.num_layers} layers of the model"
            )
        if self.dtype not in _ITEM_BYTES:
            raise ValueError(
                f"KV dtype {self.dtype!r} is not one of {sorted(_ITEM_BYTES)}"
            )

    @property
    def num_groups(self) -> int:
        return self.num_layers // self.layers_per_group

    @property
    def head_bytes(self) -> int:
        """K and V of one head of one layer of one page: the unit of a checksum."""
        item_bytes = _ITEM_BYTES[self.dtype]
        return 2 * self.page_tokens * self.head_dim * item_bytes

    @property
    def layer_bytes(self) -> int:
        return self.num_kv_heads * self.head_bytes

    @property
    def group_bytes(self) -> int:
        return self.layers_per_group * self.layer_bytes

    @property
    def page_bytes(self) -> int:
        return self.num_layers * self.layer_bytes

    @property
    def group_shape(self) -> tuple[int, ...]:
        """One page of one layer group."""
        return (
            self.layers_per_group,
            self.num_kv_heads,
            2,
            self.page_tokens,
            self.head_dim,
        )

    def num_pages(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens, the last one partly filled."""
        return -(-num_tokens // self.page_tokens)

    def describe(self) -> dict[str, int | float | str]:
        """Everything the digest covers, for people and for the root of a store."""
        return {
            "format_version": FORMAT_VERSION,
            "weights": self.weights,
            "num_layers": self.num_layers,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "dtype": self.dtype,
            "rope": self.rope,
            "norm_eps": self.norm_eps,
            "page_tokens": self.page_tokens,
        }

    @staticmethod
    def described(facts: Mapping[str, int | float | str]) -> "Layout":
        """The layout that `describe` told; its layers move one by one.

        Raises:
            ValueError: it is of another format version.
        """
        if facts["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"format_version={facts['format_version']!r} is not {FORMAT_VERSION}"
            )
        names = {f.name for f in dataclasses.fields(Layout)} - {"layers_per_group"}
        values: dict[str, Any] = {name: facts[name] for name in names}
        return Layout(layers_per_group=1, **values)

    @functools.cached_property
    def digest(self) -> bytes:
        """32 bytes that differ when a page of one layout is wrong in the other."""
        text = json.dumps(self.describe(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=32).digest()
