"""What the config.json of a Hugging Face folder says, as a `LlamaConfig`.

Knows names and spellings of entries, and what this model cannot compute. Does not know
weights.
"""

from collections.abc import Mapping

from cachedattn_jax.model.config import LlamaConfig, RopeScaling

# Field of LlamaConfig -> required entry of a Hugging Face config.json.
_REQUIRED_ENTRIES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "window": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}

# Entry of a Hugging Face config.json -> the values this model can compute.
_SUPPORTED_VALUES = {
    "model_type": ("llama", "mistral"),
    "hidden_act": (None, "silu"),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "partial_rotary_factor": (None, 1, 1.0),
    "quantization_config": (None,),
}


def read_config(entries: Mapping, dtype: str | None) -> LlamaConfig:
    """The configuration that the entries of a config.json describe.

    Args:
        dtype: "float32" or "bfloat16"; None keeps the one that is named there.
    """
    for name, supported in _SUPPORTED_VALUES.items():
        if entries.get(name) not in supported:
            raise ValueError(
                f"config.json has {name}={entries.get(name)!r}; supported:"
                f" {', '.join(map(repr, supported))}"
            )
    for name in _REQUIRED_ENTRIES.values():
        if entries.get(name) is None:
            raise ValueError(f"config.json has no {name!r}")
    fields = {field: entries[name] for field, name in _REQUIRED_ENTRIES.items()}
    num_heads = fields["num_heads"]
    # Within its sliding window a Mistral attends to everything, as a Llama does.
    sliding_window = None
    if entries["model_type"] == "mistral":
        sliding_window = entries.get("sliding_window", 4096)
    fields["window"] = min(fields["window"], sliding_window or fields["window"])
    rope_theta, rope_scaling = _read_rope(entries)
    return LlamaConfig(
        **fields,
        num_kv_heads=entries.get("num_key_value_heads") or num_heads,
        head_dim=entries.get("head_dim") or fields["hidden_size"] // num_heads,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_embeddings=bool(entries.get("tie_word_embeddings", False)),
        dtype=dtype or _stored_dtype(entries),
    )


def _read_rope(entries: Mapping) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from `rope_parameters` (transformers 5) or `rope_scaling`."""
    rope = entries.get("rope_parameters") or entries.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or entries.get("rope_theta") or 10000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(
            f"partial_rotary_factor={rope['partial_rotary_factor']} must be 1"
        )
    if kind == "default":
        return float(theta), None
    names = {"factor": "factor"}
    if kind == "llama3":
        names["low_freq_factor"] = "low_freq_factor"
        names["high_freq_factor"] = "high_freq_factor"
        names["original_window"] = "original_max_position_embeddings"
    for name in names.values():
        if name not in rope:
            raise ValueError(f"rope scaling {kind!r} in config.json has no {name!r}")
    return float(theta), RopeScaling(
        kind=kind, **{field: rope[name] for field, name in names.items()}
    )


def _stored_dtype(entries: Mapping) -> str:
    name = entries.get("dtype") or entries.get("torch_dtype")
    if name not in ("float32", "bfloat16"):
        raise ValueError(
            f"config.json has dtype={name!r}, which is not computed in; choose"
            " dtype='float32' or dtype='bfloat16'"
        )
    return name
