"""Claim: reusing the KV cache of earlier turns gives the same tokens far sooner.

Serves the same conversations twice on the same engine, once keeping the KV cache of
finished turns in three tiers and once recomputing it (paper, section 4.1). Every turn of
both modes has the same prompt; every token is compared.

    cachedattn run configs/quickstart.gin        2 CPU cores, about 2 minutes

Expected: no token differs, all three tiers serve hits, and the time to first token of
later turns, queueing left out, falls by 80 % or more (the paper: up to 87 %).
"""

import dataclasses
from collections.abc import Mapping

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cachedattn_jax.engine.engine import Engine, EngineConfig
from cachedattn_jax.engine.turn import Turn
from cachedattn_jax.model.config import LlamaConfig, preset
from cachedattn_jax.model.llama import LlamaParams, init_params, weights_digest
from cachedattn_jax.run_directory import Claim, InvariantBroken, RunDirectory
from cachedattn_jax.store.budget import StoreConfig
from experiments.measures import SOURCES, compare_tokens, mode_summary
from experiments.replay import Replayed, TurnName, replay
from experiments.report import write_report
from experiments.workload import Workload

MODES = ("cached", "recompute")


def run(
    run_directory: RunDirectory,
    *,
    workload: Workload,
    model: str = "small",
    window: int | None = None,
    length_scale: float = 1.0,
    time_factor: float = 1.0,
    engine: EngineConfig = EngineConfig(),
    store: StoreConfig = StoreConfig(),
    seed: int = 0,
) -> dict[str, object]:
    """Plays the workload in both modes and compares them.

    Args:
        model: name of a preset; its weights are random, drawn from `seed`.
        window: of the model, if not the preset's.
        length_scale: message lengths of the workload are multiplied by this.
        time_factor: arrivals and think times are multiplied by this.
        store: budgets of the cached mode. A `disk_root` that is not given is made
            inside the run directory.

    Raises:
        InvariantBroken: a token differs between the modes.
    """
    config = preset(model) if window is None else preset(model, window=window)
    played = workload.scaled(length_scale, config.window - 1)
    console = Console()
    _print_workload(console, config, played)
    params = init_params(config, seed)
    weights = weights_digest(params)
    if store.num_disk_bytes and store.disk_root is None:
        root = str(run_directory.fresh_folder("disk"))
        store = dataclasses.replace(store, disk_root=root)

    replays: dict[str, Replayed] = {}
    for mode in MODES:
        mode_engine = dataclasses.replace(engine, reuse=mode)
        with Engine(config, params, mode_engine, store, weights=weights) as served:
            replays[mode] = _play(
                console, run_directory, served, played, mode, seed, time_factor, replays
            )
    ...
    return {}
