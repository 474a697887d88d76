"""Multi-turn LLM serving that keeps the KV cache of every conversation in tiers.

The public names are loaded when first used, so that importing a leaf module pulls in no
more than the leaf needs.
"""

import importlib
from typing import Any

_PUBLIC = {
    "Engine": "cachedattn_jax.engine.engine",
    "EngineConfig": "cachedattn_jax.engine.engine_config",
    "FaultConfig": "cachedattn_jax.store.objects.fault_config",
    "IoConfig": "cachedattn_jax.store.objects.io_config",
    "LlamaConfig": "cachedattn_jax.model.config",
    "Request": "cachedattn_jax.engine.request",
    "SamplingParams": "cachedattn_jax.engine.request",
    "Session": "cachedattn_jax.engine.session",
    "StoreConfig": "cachedattn_jax.store.budget",
    "Turn": "cachedattn_jax.engine.turn",
    "init_params": "cachedattn_jax.model.llama",
    "load_checkpoint": "cachedattn_jax.model.checkpoint",
    "load_hugging_face": "cachedattn_jax.model.checkpoint",
    "preset": "cachedattn_jax.model.config",
    "prometheus_text": "cachedattn_jax.metrics",
    "save_checkpoint": "cachedattn_jax.model.checkpoint",
}

__all__ = sorted(_PUBLIC)  # pyright: ignore[reportUnsupportedDunderAll]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
