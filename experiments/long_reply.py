"""One reply that goes on past the window: what its steps take, and what they do.

Knows an engine and a clock. Does not know what is claimed of the steps.
"""

import dataclasses
import time

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from cachedattn_jax.engine.engine import Engine
from cachedattn_jax.engine.engine_config import EngineConfig
from cachedattn_jax.engine.truncation import TruncationConfig
from cachedattn_jax.engine.turn import Turn
from cachedattn_jax.model.config import LlamaConfig
from cachedattn_jax.model.llama import LlamaParams
from cachedattn_jax.store.budget import StoreConfig
from experiments.bench import noise

# What a step may do beside computing a token.
_KINDS = ("truncating", "saving")


def step_times(
    config: LlamaConfig,
    params: LlamaParams,
    engine: EngineConfig,
    store: StoreConfig,
    *,
    num_tokens: int,
    num_replies: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds [replies, steps] of several replies, without prefill and end.

    Returns:
        What each step did beside computing a token, too: "truncating", "saving" or
        "decoding" for nothing.
    """
    truncation = TruncationConfig(ratio=engine.truncation.ratio)
    settings = dataclasses.replace(engine, truncation=truncation)
    found, kinds = [], []
    with Engine(config, params, settings, store, weights="random") as served:
        served.warm_up()
        for number in range(num_replies):
            # Other tokens each time: pages that were seen before are not saved again.
            rng = np.random.default_rng([seed, number])
            prompt = noise(rng, 16, config.vocab_size)
            session = served.session(f"long-{number}")
            turn = session.submit(prompt, max_tokens=num_tokens)
            times, kinds = [], []
            while not turn.is_finished:
                num_before, before = len(turn.reply), _counted(served, turn)
                started_s = time.perf_counter()
                served.step()
                if len(turn.reply) > num_before:
                    times.append(time.perf_counter() - started_s)
                    done = zip(_KINDS, before, _counted(served, turn), strict=True)
                    kinds.append(next((k for k, a, b in done if b > a), "decoding"))
            found.append(times[1 : num_tokens - 2])
            session.forget()
    return np.asarray(found), np.asarray(kinds[1 : num_tokens - 2])


def _counted(engine: Engine, turn: Turn) -> tuple[int, int]:
    """What the steps of `_KINDS` count up."""
    return turn.num_truncations, engine.store.counters["bytes_device_to_host"]


def long_reply_summary(times: np.ndarray, kinds: np.ndarray) -> dict:
    """Of the median and of the least time of each step: its median, its sum, and the
    most by what the step did.
    """
    found: dict = {
        "tokens": times.shape[1],
        "fastest_reply_s": float(times.sum(1).min()),
    }
    for name, steps in (("medians", np.median(times, 0)), ("leasts", times.min(0))):
        found[name] = {
            "median_s": float(np.median(steps)),
            "sum_s": float(steps.sum()),
            "max_s": {k: float(steps[kinds == k].max()) for k in np.unique(kinds)},
        }
    return found


def plot_steps(steps: np.ndarray, kinds: np.ndarray) -> Figure:
    figure, axes = plt.subplots(figsize=(7, 2.4), layout="constrained")
    for kind in np.unique(kinds):
        (places,) = np.nonzero(kinds == kind)
        size = 2 if kind == "decoding" else 8
        axes.plot(places, 1e3 * steps[places], ".", markersize=size, label=kind)
    axes.set(xlabel="token of the reply", ylabel="step, ms", ylim=(0, None))
    axes.legend()
    return figure
