"""Weights on disk: this project's checkpoints, and Hugging Face folders to read.

Knows files and names of tensors. Does not know how weights are used.

    directory/model.json    config and digest of the weights, written last
    directory/weights/      an orbax checkpoint of `LlamaParams`
"""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp
from jaxtyping import Array, Shaped

from cachedattn_jax.model.config import LlamaConfig, RopeScaling
from cachedattn_jax.model.hugging_face_config import read_config
from cachedattn_jax.model.layers import join_qkv
from cachedattn_jax.model.llama import LlamaParams, abstract_params, weights_digest

_FORMAT_VERSION = 2  # 1: queries, keys and values had kernels of their own
_DESCRIPTION = "model.json"
_WEIGHTS = "weights"

# Module and parameter of a layer -> tensor of a Hugging Face layer.
_LAYER_TENSORS = {
    ("input_norm", "scale"): "input_layernorm.weight",
    ("attention", "o_proj", "kernel"): "self_attn.o_proj.weight",
    ("post_attention_norm", "scale"): "post_attention_layernorm.weight",
    ("mlp", "gate_proj", "kernel"): "mlp.gate_proj.weight",
    ("mlp", "up_proj", "kernel"): "mlp.up_proj.weight",
    ("mlp", "down_proj", "kernel"): "mlp.down_proj.weight",
}
# Tensors of a Hugging Face layer that are one kernel here.
_QKV_TENSORS = tuple(f"self_attn.{name}_proj.weight" for name in "qkv")


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
            f" {_FORMAT_VERSION}: write it anew"
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
    config = read_config(entries, dtype)
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
        expected.update(_layer_tensors(config, name, layer))
    _check_tensors(directory, expected, stored)
    layers = []
    for name, layer in zip(names, target.layers, strict=True):
        shapes = _layer_tensors(config, name, layer)
        layers.append(_nest(config, name, _load_tensors(directory, shapes)))
    tensors = _load_tensors(directory, ends)
    head = tensors.get("lm_head.weight")
    return LlamaParams(
        embedding=tensors["model.embed_tokens.weight"],
        layers=tuple(layers),
        final_norm=tensors["model.norm.weight"],
        lm_head=None if head is None else _transpose(head),
    )


def _layer_tensors(
    config: LlamaConfig, name: str, layer: dict
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the tensors of one layer as Hugging Face stores them."""
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    tensors = {
        f"{name}.{tensor_name}": jax.ShapeDtypeStruct(
            (count * config.head_dim, config.hidden_size), config.dtype
        )
        for tensor_name, count in zip(_QKV_TENSORS, heads, strict=True)
    }
    for path, tensor_name in _LAYER_TENSORS.items():
        leaf: Any = layer
        for key in path:
            leaf = leaf[key]
        is_kernel = path[-1] == "kernel"
        tensors[f"{name}.{tensor_name}"] = (
            _transposed_shape(leaf) if is_kernel else leaf
        )
    return tensors


def _nest(config: LlamaConfig, name: str, tensors: Mapping[str, Array]) -> dict:
    """One entry of `LlamaParams.layers` out of the tensors of that layer."""
    qkv = (tensors[f"{name}.{tensor_name}"] for tensor_name in _QKV_TENSORS)
    kernel = _join_transposed(*qkv, config.num_kv_heads)
    layer: dict = {"attention": {"qkv_proj": {"kernel": kernel}}}
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


@functools.partial(jax.jit, static_argnames="num_kv_heads")
def _join_transposed(
    query: Shaped[Array, "queries hidden"],
    key: Shaped[Array, "keys hidden"],
    value: Shaped[Array, "values hidden"],
    num_kv_heads: int,
) -> Shaped[Array, "hidden outputs"]:
    return join_qkv(query.T, key.T, value.T, num_kv_heads)
