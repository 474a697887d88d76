"""Claim: a store that cannot help does not hurt.

Conversations of one turn each: nothing is ever reused, everything fits on the device.
Tokens per second of the engine with the store on, which saves every page to host memory
in the background, over those of the same engine without it, in interleaved pairs.

    cachedattn run configs/store_overhead.gin        2 CPU cores, about 3 minutes

Expected: at least 0.97x.
"""

import functools
import time

import numpy as np
from rich.console import Console

from cachedattn_jax.engine.engine import Engine
from cachedattn_jax.engine.engine_config import EngineConfig
from cachedattn_jax.model.config import preset
from cachedattn_jax.model.llama import init_params
from cachedattn_jax.run_directory import Claim, RunDirectory
from cachedattn_jax.store.budget import StoreConfig
from experiments.bench import interval, noise, repeat, serve, submit

MODES = {"store on": "cached", "store off": "recompute"}


def run(
    run_directory: RunDirectory,
    *,
    model: str = "small",
    engine: EngineConfig = EngineConfig(),
    store: StoreConfig = StoreConfig(),
    prompt: int = 192,
    reply: int = 64,
    num_turns: int = 8,
    pairs: int = 12,
    seed: int = 0,
) -> dict[str, object]:
    """Serves the same number of turns with and without the store, again and again."""
    config = preset(model)
    params = init_params(config, seed)
    rng = np.random.default_rng(seed)
    engines = {}
    for mode, reuse in MODES.items():
        settings = EngineConfig(**{**vars(engine), "reuse": reuse})
        engines[mode] = Engine(config, params, settings, store, weights="random")
        engines[mode].warm_up()

    def trial(mode: str) -> float:
        served = engines[mode]
        for index in range(num_turns):
            tokens = noise(rng, prompt, config.vocab_size)
            submit(served, f"s{index}", tokens, reply)
        started = time.monotonic()
        serve(served)
        return num_turns * (prompt + reply) / (time.monotonic() - started)

    trials = {mode: functools.partial(trial, mode) for mode in MODES}
    try:
        speeds = repeat(trials, pairs, "pairs")
        saved = engines["store on"].store.counters["bytes_device_to_host"]
    finally:
        for served in engines.values():
            served.close()
    ratios = [
        on / off
        for on, off in zip(speeds["store on"], speeds["store off"], strict=True)
    ]
    ratio = interval(ratios)
    Console().print(
        f"tokens/s with the store over without, {pairs} pairs: {ratio};"
        f" {saved / 2**20:,.0f} MiB were saved",
        highlight=False,
    )
    return {
        "tokens_per_s": {mode: float(np.mean(v)) for mode, v in speeds.items()},
        "ratios": ratios,
        "interval": [ratio.low, ratio.high],
        "bytes_device_to_host": saved,
        "claims": [
            Claim(
                name="tokens/s, store on over store off, mean of pairs",
                value=ratio.mean,
                target=0.97,
                unit="x",
            )
        ],
    }
