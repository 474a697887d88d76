"""What a Llama-shaped model is: sizes, rotary frequencies, named presets.

Knows numbers only, so that schedulers and simulators can use it without jax. Does not
know weights or arrays on a device.
"""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import no_type_check

import numpy as np

DTYPES = ("float32", "bfloat16")

_REFUSED_SCALINGS = {
    "dynamic": "its frequencies change with the sequence length, so the rotation of a"
    " stored key would be wrong for a longer context",
    "yarn": "it needs an attention factor on every score, which the attention ops do"
    " not apply",
}

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "window",
)


def _check_positive_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1")


def _number(name: str, value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        if math.isfinite(value):
            return float(value)
    raise ValueError(f"{name}={value!r} must be a finite number")


# Fields hold what a user wrote in a file, of any type: __post_init__ answers in words.
@no_type_check
@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the window of the pretraining.

    Attributes:
        kind: "linear" divides every frequency by `factor`; "llama3" divides the slow
            ones, keeps the fast ones, and blends in between.
        low_freq_factor: llama3 only; waves longer than original_window /
            low_freq_factor are slow.
        high_freq_factor: llama3 only; waves shorter than original_window /
            high_freq_factor are fast.
        original_window: llama3 only; tokens of context in the pretraining.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_window: int = 8192

    def __post_init__(self) -> None:
        if self.kind in _REFUSED_SCALINGS:
            raise ValueError(
                f"rope scaling {self.kind!r} is not supported:"
                f" {_REFUSED_SCALINGS[self.kind]}"
            )
        if self.kind not in ("linear", "llama3"):
            raise ValueError(
                f"rope scaling {self.kind!r} is not one of 'linear', 'llama3'"
            )
        # As floats, since the digest of a store's layout is made of their text.
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        if self.factor < 1.0:
            raise ValueError(f"factor={self.factor} must be at least 1")
        if not 0.0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} must be positive and below"
                f" high_freq_factor={self.high_freq_factor}"
            )
        _check_positive_int("original_window", self.original_window)

    def scale(self, inverse_frequencies: np.ndarray) -> np.ndarray:
        """Scaled copy of float64 frequencies, in radians per token."""
        if self.kind == "linear":
            return inverse_frequencies / self.factor
        turns = self.original_window * inverse_frequencies / (2 * np.pi)
        span = self.high_freq_factor - self.low_freq_factor
        kept = np.clip((turns - self.low_freq_factor) / span, 0.0, 1.0)
        return inverse_frequencies * (kept + (1.0 - kept) / self.factor)


@no_type_check
@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Shape and numerics of one model; hashable, so it can be a static jit argument.

    Attributes:
        window: most tokens of context, prompt and reply together.
        norm_eps: added to the mean square in every RMSNorm.
        tie_embeddings: whether the output projection is the transposed embedding.
        dtype: of weights, activations and KV cache.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in _SIZES:
            _check_positive_int(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of"
                f" num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} must be even: rotary embedding turns pairs"
            )
        for name in ("rope_theta", "norm_eps"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        if self.rope_theta <= 1.0:
            raise ValueError(f"rope_theta={self.rope_theta} must be above 1")
        if not 0.0 < self.norm_eps < 1.0:
            raise ValueError(f"norm_eps={self.norm_eps} must lie between 0 and 1")
        if not isinstance(self.rope_scaling, RopeScaling | None):
            raise ValueError(
                f"rope_scaling={self.rope_scaling!r} must be a RopeScaling or None"
            )
        if not isinstance(self.tie_embeddings, bool):
            raise ValueError(
                f"tie_embeddings={self.tie_embeddings!r} must be True or False"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not one of {', '.join(DTYPES)}")

    def inverse_frequencies(self) -> np.ndarray:
        """Radians per token of each rotated pair: float64 [head_dim / 2]."""
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim
        plain = self.rope_theta**-exponents
        return self.rope_scaling.scale(plain) if self.rope_scaling else plain

    @property
    def num_parameters(self) -> int:
        """Weights of the model, each counted once."""
        heads = 2 * self.num_heads + 2 * self.num_kv_heads
        attention = self.hidden_size * self.head_dim * heads
        mlp = 3 * self.hidden_size * self.intermediate_size
        layer = attention + mlp + 2 * self.hidden_size
        ends = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + ends + self.hidden_size


_LLAMA_2_7B = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    window=4096,
    dtype="bfloat16",
)
_LLAMA_3_8B = replace(
    _LLAMA_2_7B,
    vocab_size=128256,
    intermediate_size=14336,
    num_kv_heads=8,
    window=8192,
    rope_theta=500000.0,
)
_SHAPE_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_layers": 80,
    "num_heads": 64,
    "num_kv_heads": 8,
}

PRESETS: dict[str, LlamaConfig] = {
    "tiny": LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        window=256,
    ),
    "small": LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        num_layers=6,
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
        window=2048,
        tie_embeddings=True,
    ),
    "llama-2-7b": _LLAMA_2_7B,
    "llama-2-13b": replace(
        _LLAMA_2_7B,
        hidden_size=5120,
        intermediate_size=13824,
        num_layers=40,
        num_heads=40,
        num_kv_heads=40,
    ),
    "llama-2-70b": replace(_LLAMA_2_7B, **_SHAPE_70B),
    "llama-3-8b": _LLAMA_3_8B,
    "llama-3-70b": replace(_LLAMA_3_8B, **_SHAPE_70B),
    # v0.2 and later: no sliding window.
    "mistral-7b": replace(
        _LLAMA_3_8B, vocab_size=32000, window=32768, rope_theta=1000000.0
    ),
}


def preset(name: str, **overrides) -> LlamaConfig:
    """The named configuration, with fields replaced by `overrides`."""
    if name not in PRESETS:
        raise ValueError(f"unknown model {name!r}; {_nearest(name, PRESETS)}")
    known = [field.name for field in fields(LlamaConfig)]
    for field in overrides:
        if field not in known:
            raise ValueError(f"LlamaConfig has no {field!r}; {_nearest(field, known)}")
    return replace(PRESETS[name], **overrides)


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known)}"
