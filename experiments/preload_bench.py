"""Engines that differ in their read buffer, each with one conversation to load.

Knows how to make a turn load its history behind another prefill. Does not know what is
made of the times.
"""

from collections.abc import Sequence

import numpy as np

from cachedattn_jax.engine.engine import Engine
from cachedattn_jax.engine.engine_config import EngineConfig
from cachedattn_jax.engine.turn import Turn
from cachedattn_jax.model.config import LlamaConfig
from cachedattn_jax.model.llama import LlamaParams
from cachedattn_jax.store.budget import StoreConfig
from cachedattn_jax.store.link import EmulatedLink
from cachedattn_jax.store.placement.tier import Tier
from experiments.bench import noise, serve, submit, to_tier

NO_PRELOAD = "no pre-load"
AUTO = "auto"


class PreloadBench:
    """Engines that differ in their read buffer, and one conversation on each.

    Args:
        modes: "d = 2", `AUTO` or `NO_PRELOAD`; "d = 2, compute_first" has another order
            of copies and computes than the engine's own.
    """

    def __init__(
        self,
        config: LlamaConfig,
        params: LlamaParams,
        engine: EngineConfig,
        modes: Sequence[str],
        history: int,
        new: int,
        store: StoreConfig,
        seed: int,
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.config, self.num_new = config, new
        self.history = noise(self.rng, history, config.vocab_size)
        self.engines = {
            mode: self._engine(params, engine, store, mode) for mode in (*modes, "all")
        }
        layout = self.engines["all"].store.layout
        self.num_groups = layout.num_groups
        self.load_bytes = layout.num_pages(history) * layout.page_bytes

    def _engine(
        self, params: LlamaParams, engine: EngineConfig, store: StoreConfig, mode: str
    ) -> Engine:
        depth, _, order = mode.partition(", ")
        depths = {NO_PRELOAD: 0, AUTO: "auto", "all": self.config.num_layers}
        fields = {
            "read_buffer": depths.get(depth, depth.removeprefix("d = ")),
            "is_preloading": depth != NO_PRELOAD,
            "put_order": order or engine.put_order,
            "loading": "always",
        }
        if fields["read_buffer"] != "auto":
            fields["read_buffer"] = int(fields["read_buffer"])
        settings = EngineConfig(**{**vars(engine), **fields})
        served = Engine(self.config, params, settings, store, weights="random")
        served.warm_up()
        submit(served, "ours", self.history)
        serve(served)
        return served

    def turn(self, mode: str, link: EmulatedLink | None) -> Turn:
        """A turn from host memory, queued behind the prefill of another one."""
        engine = self.engines[mode]
        engine.store.links.emulate(None, None)
        to_tier(engine, Tier.HOST)
        engine.store.links.emulate(link, None)
        vocab = self.config.vocab_size
        other = noise(self.rng, self.config.window - 8, vocab)
        submit(engine, "other", other)
        new = noise(self.rng, self.num_new, vocab)
        turn = submit(engine, "ours", [*self.history, *new])
        serve(engine)
        engine.store.links.emulate(None, None)
        engine.store.saver.drain()
        engine.forget("default", "other")  # or its pages would push ours out
        return turn

    def close(self) -> None:
        for engine in self.engines.values():
            engine.store.links.emulate(None, None)
            engine.close()
