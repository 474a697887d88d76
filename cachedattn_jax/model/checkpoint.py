"""Weights on disk: this project's checkpoints, and Hugging Face folders to read.

Knows files and names of tensors. Does not know how weights are used.

    directory/model.json    config and digest of the weights, written last
    directory/weights/      an orbax checkpoint of `LlamaParams`
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp
from jaxtyping import Array, Shaped

from cachedattn_jax.model.config import LlamaConfig, RopeScaling
from cachedattn_jax.model.llama import LlamaParams, abstract_params, weights_digest

_FORMAT_VERSION = 1
_DESCRIPTION = "model.json"
_WEIGHTS = "weights"

# Module and parameter of a layer -> tensor of a Hugging Face layer.
_LAYER_TENSORS = {
    ("input_norm", "scale"): "input_layernorm.weight",
    ("attention", "q_proj", "kernel"): "self_attn.q_proj.weight",
    ("attention", "k_proj", "kernel"): "self_attn.k_proj.weight",
    ("attention", "v_proj", "kernel"): "self_attn.v_proj.weight",
    ("attention", "o_proj", "kernel"): "self_attn.o_proj.weight",
    ("post_attention_norm", "scale"): "post_attention_layernorm.weight",
    ("mlp", "gate_proj", "kernel"): "mlp.gate_proj.weight",
    ("mlp", "up_proj", "kernel"): "mlp.up_proj.weight",
    ("mlp", "down_proj", "kernel"): "mlp.down_proj.weight",
}

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


def save_checkpoint(
    directory: str | os.PathLike, config: LlamaConfig, params: LlamaParams
) -> None:
    """Writes config and weights into a new or empty directory."""
    directory = Path(directory).absolute()
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"cannot save a checkpoint: {directory} is not a directory")
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"cannot save a checkpoint: {directory} is not empty")
    directory.mkdir(parents=True, exist_ok=True)
    ocp.save(str(directory / _WEIGHTS), params)
    description = {
        "format_version": _FORMAT_VERSION,
        "config": dataclasses.asdict(config),
        "weights_digest": weights_digest(params),
    }
    # A reader sees the whole file or none.
    unfinished = directory / f"{_DESCRIPTION}.unfinished"
    unfinished.write_text(json.dumps(description, indent=2) + "\n")
    unfinished.replace(directory / _DESCRIPTION)


def load_checkpoint(directory: str | os.PathLike) -> tuple[LlamaConfig, LlamaParams]:
    """Reads what `save_checkpoint` wrote, and checks that no weight has changed."""
    directory = Path(directory).absolute()
    description = _read_json(directory / _DESCRIPTION, "a checkpoint")
    version = description.get("format_version")
    if version != _FORMAT_VERSION:
        raise ValueError(
            f"{directory} has checkpoint format {version!r}; this version reads"
            f" {_FORMAT_VERSION}"
        )
    fields = dict(description["config"])
    if fields["rope_scaling"] is not None:
        fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
    config = LlamaConfig(**fields)
    targets = jax.tree.map(_on_default_device, abstract_params(config))
    params = ocp.load(str(directory / _WEIGHTS), targets)
    digest = weights_digest(params)
    if digest != description["weights_digest"]:
        raise ValueError(
            f"the weights in {directory} are damaged: their digest is {digest}, not"
            f" {description['weights_digest']}"
        )
    return config, params


def load_hugging_face(
    directory: str | os.PathLike, dtype: str | None = None
) -> tuple[LlamaConfig, LlamaParams]:
    """Reads a Hugging Face Llama or Mistral folder: config.json and *.safetensors.

    Args:
        dtype: "float32" or "bfloat16"; None keeps the one named in config.json.
    """
    directory = Path(directory).absolute()
    entries = _read_json(directory / "config.json", "a Hugging Face model")
    if not any(directory.glob("*.safetensors")):
        raise ValueError(f"{directory} holds no *.safetensors file")
    config = _read_config(entries, dtype)
    with ocp.Context(checkpoint_layout=ocp.options.CheckpointLayout.SAFETENSORS):
        stored = ocp.metadata(str(directory)).metadata
        if biases := sorted(name for name in stored if name.endswith(".bias")):
            raise ValueError(f"{directory} has {biases[0]!r}; biases are not supported")
        return config, _read_params(directory, config, stored)


def _read_params(
    directory: Path,
    config: LlamaConfig,
    stored: Mapping[str, jax.ShapeDtypeStruct],
) -> LlamaParams:
    """Reads layer by layer, so that only one layer is ever held twice."""
    target: Any = abstract_params(config)
    ends = {
        "model.embed_tokens.weight": target.embedding,
        "model.norm.weight": target.final_norm,
    }
    if target.lm_head is not None:
        ends["lm_head.weight"] = _transposed_shape(target.lm_head)
    names = [f"model.layers.{index}" for index in range(config.num_layers)]
    expected = dict(ends)
    for name, layer in zip(names, target.layers, strict=True):
        expected.update(_layer_tensors(name, layer))
    _check_tensors(directory, expected, stored)
    layers = []
    for name, layer in zip(names, target.layers, strict=True):
        tensors = _load_tensors(directory, _layer_tensors(name, layer))
        layers.append(_nest(name, tensors))
    tensors = _load_tensors(directory, ends)
    head = tensors.get("lm_head.weight")
    return LlamaParams(
        embedding=tensors["model.embed_tokens.weight"],
        layers=tuple(layers),
        final_norm=tensors["model.norm.weight"],
        lm_head=None if head is None else _transpose(head),
    )


def _layer_tensors(name: str, layer: dict) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the tensors of one layer as Hugging Face stores them."""
    tensors = {}
    for path, tensor_name in _LAYER_TENSORS.items():
        leaf: Any = layer
        for key in path:
            leaf = leaf[key]
        is_kernel = path[-1] == "kernel"
        tensors[f"{name}.{tensor_name}"] = (
            _transposed_shape(leaf) if is_kernel else leaf
        )
    return tensors


def _nest(name: str, tensors: Mapping[str, Array]) -> dict:
    """One entry of `LlamaParams.layers` out of the tensors of that layer."""
    layer: dict = {}
    for path, tensor_name in _LAYER_TENSORS.items():
        tensor = tensors[f"{name}.{tensor_name}"]
        parent = layer
        for key in path[:-1]:
            parent = parent.setdefault(key, {})
        parent[path[-1]] = _transpose(tensor) if path[-1] == "kernel" else tensor
    return layer


def _check_tensors(
    directory: Path,
    expected: Mapping[str, jax.ShapeDtypeStruct],
    stored: Mapping[str, jax.ShapeDtypeStruct],
) -> None:
    for name, leaf in expected.items():
        if name not in stored:
            raise ValueError(f"{directory} has no tensor {name!r}")
        if stored[name].shape != leaf.shape:
            raise ValueError(
                f"tensor {name!r} in {directory} has shape {stored[name].shape};"
                f" config.json implies {leaf.shape}"
            )


def _load_tensors(
    directory: Path, targets: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, Array]:
    return ocp.load(str(directory), jax.tree.map(_on_default_device, dict(targets)))


def _read_config(entries: Mapping, dtype: str | None) -> LlamaConfig:
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


def _read_json(path: Path, what: str) -> dict:
    if not path.is_file():
        raise ValueError(f"{path.parent} does not hold {what}: no {path.name}")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _on_default_device(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _transposed_shape(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape[::-1], leaf.dtype)


@jax.jit
def _transpose(
    weight: Shaped[Array, "outputs inputs"],
) -> Shaped[Array, "inputs outputs"]:
    return weight.T
