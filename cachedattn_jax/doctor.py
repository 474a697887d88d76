"""What copies and programs cost on this machine, and what the engine makes of it.

Knows how to make an engine only to measure it. Does not know experiments.
"""

import tempfile
from collections.abc import Callable

from cachedattn_jax.engine.cost_model import Constants
from cachedattn_jax.engine.engine import Engine
from cachedattn_jax.engine.engine_config import EngineConfig
from cachedattn_jax.model.config import LlamaConfig, preset
from cachedattn_jax.model.llama import init_params
from cachedattn_jax.store.budget import StoreConfig


def examine(
    model: str,
    *,
    disk_root: str | None,
    page_tokens: int,
    layers_per_group: int,
    chunk_tokens: tuple[int, ...],
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Engine, Constants]:
    """Measures an engine on random weights of a preset, and closes it.

    Args:
        disk_root: where a new folder for the disk's share is made and removed again;
            None for the place of temporary files.

    Raises:
        ValueError: the preset is unknown, or a size does not fit the model.
    """
    config = preset(model)
    settings = EngineConfig(
        page_tokens=page_tokens,
        layers_per_group=layers_per_group,
        chunk_tokens=chunk_tokens,
    )
    try:
        folder = tempfile.TemporaryDirectory(dir=disk_root, prefix="cachedattn-doctor-")
    except OSError as error:
        raise ValueError(
            f"--disk_root={disk_root!r} cannot be used: {error}"
        ) from error
    with folder as root:
        page_bytes = _page_bytes(config, page_tokens)
        store = StoreConfig(
            device_bytes=page_bytes * (config.window // page_tokens + 64),
            host_bytes=page_bytes * 64,
            disk_bytes=page_bytes * 64,
            disk_root=root,
        )
        params = init_params(config, 0)
        with Engine(config, params, settings, store, weights="random") as engine:
            engine.warm_up(progress)
            constants = engine.cost_model.constants
            assert constants is not None
            return engine, constants


def _page_bytes(config: LlamaConfig, page_tokens: int) -> int:
    item_bytes = 4 if config.dtype == "float32" else 2
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return per_token * item_bytes * page_tokens
