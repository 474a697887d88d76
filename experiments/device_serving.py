"""Claim: on a device, serving from the cache takes far less time than recomputing.

Plays conversations of real lengths (ShareGPT) with a large model in bfloat16, once
keeping the KV cache in three tiers and once recomputing it (paper, section 4.2). Every
turn of both modes has the same prompt.

    cachedattn run configs/h200.gin --gin_bindings 'device.run.only = ("serving",)'

In bfloat16 a prefill of 50 tokens on a history and one of 1,000 tokens round in other
places, so that two nearly equal logits may swap; how far apart the two best were where
the modes first differ is a claim.
"""

import dataclasses
import math
from collections.abc import Mapping

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from cachedattn_jax.engine.engine import Engine
from cachedattn_jax.engine.engine_config import EngineConfig
from cachedattn_jax.gantt import busiest_turn, draw_turn
from cachedattn_jax.model.config import preset
from cachedattn_jax.model.llama import init_params
from cachedattn_jax.run_directory import Claim, RunDirectory
from cachedattn_jax.store.budget import StoreConfig
from cachedattn_jax.timeline import busy_s
from experiments.measures import SOURCES, compare_tokens, gains, mode_summary
from experiments.replay import Replayed
from experiments.report import write_report
from experiments.reuse import play, plot_ttft
from experiments.workload import Workload

MODES = ("cached", "recompute")
# Logits of random weights spread by 1.4; 40 layers in bfloat16 move them by about 0.03.
_MARGIN = 0.15


def run(
    run_directory: RunDirectory,
    *,
    workload: Workload,
    model: str = "llama-2-13b",
    dtype: str = "bfloat16",
    time_factor: float = 1.0,
    length_scale: float = 1.0,
    engine: EngineConfig = EngineConfig(),
    store: StoreConfig = StoreConfig(),
    seed: int = 0,
    seconds: float = math.inf,
) -> dict:
    """Plays the workload in both modes and compares them.

    Args:
        time_factor: arrivals and think times are multiplied by this.
        store: budgets of the cached mode. A `disk_root` that is not given is made
            inside the run directory.
        seconds: it takes what it takes, since half of it compares nothing.
    """
    config = preset(model, dtype=dtype)
    params = init_params(config, seed)
    played = workload.scaled(length_scale, config.window - 1)
    if store.num_disk_bytes and store.disk_root is None:
        root = str(run_directory.fresh_folder("disk"))
        store = dataclasses.replace(store, disk_root=root)
    console = Console()
    replays: dict[str, Replayed] = {}
    modes: dict[str, dict] = {}
    figures: dict[str, Figure] = {}
    for mode in MODES:
        settings = dataclasses.replace(engine, reuse=mode)
        with Engine(config, params, settings, store, weights="random") as served:
            said = replays[MODES[0]].turns if replays else None
            replays[mode] = play(console, served, played, mode, seed, time_factor, said)
            modes[mode] = {
                **mode_summary(replays[mode]),
                "gpu_busy_s": _gpu_busy_s(served),
                "counters": dict(served.store.counters),
            }
            # Closing would write the whole host tier to disk, minutes of it.
            for conversation in played.conversations:
                served.forget("default", conversation.session_id)
            if mode == "cached":
                events = served.timeline.events
                run_directory.write_timeline(served.timeline.chrome_trace())
                turn = busiest_turn(events)
                figures["The turn with most to load"] = draw_turn(events, turn)
        rows = [turn.row() for turn in replays[mode].turns.values()]
        run_directory.append_turns([{"mode": mode, **row} for row in rows])
    summary = _summary(played, modes, replays)
    _print(modes)
    figures["Time to first token against history"] = plot_ttft(replays)
    write_report(run_directory, f"{model}: cached against recomputed", summary, figures)
    return summary


def _gpu_busy_s(served: Engine) -> float:
    """Seconds during which prefills or decode steps were under way."""
    events = served.timeline.events
    return busy_s((e.start_s, e.end_s) for e in events if e.track == "compute")


def _summary(
    played: Workload, modes: Mapping[str, dict], replays: Mapping[str, Replayed]
) -> dict:
    cached, recompute = (modes[mode] for mode in MODES)
    tokens = compare_tokens(*[replays[mode].turns for mode in MODES])
    apart = [d.margin for d in (*tokens.ties, *tokens.differences)]
    stalled, loaded = (
        sum(getattr(turn, name) for turn in replays["cached"].turns.values())
        for name in ("exposed_stall_s", "load_s")
    )
    comparison = {
        **gains(cached, recompute),
        "gpu_busy_ratio": recompute["gpu_busy_s"] / cached["gpu_busy_s"],
        "turns_that_differ": len(apart),
        "turns_compared": tokens.num_turns,
        "largest_margin_at_a_difference": max(apart, default=0.0),
        "stalled_s": stalled,
        "loaded_s": loaded,
    }
    return {
        "workload": played.describe(),
        "modes": modes,
        "comparison": comparison,
        "claims": _claims(cached, comparison),
    }


def _claims(cached: dict, comparison: dict) -> list[Claim]:
    is_complete = sum(cached["tokens_from"].values()) == cached["prompt_tokens"]
    stall = comparison["stalled_s"], comparison["loaded_s"]
    return [
        Claim(
            name="TTFT reduction of later turns, no queueing",
            value=comparison["ttft_reduction_later_turns"],
            target=0.8,
        ),
        Claim(
            name="prefill speed-up",
            value=comparison["prefill_speedup"],
            target=2.0,
            unit="x",
        ),
        Claim(
            name="GPU time of recomputing over that of the cache",
            value=comparison["gpu_busy_ratio"],
            target=1.0,
            unit="x",
        ),
        Claim(
            name="history found in a tier",
            value=cached["history_hit_rate"],
            target=0.95,
        ),
        Claim(
            name="exposed stall over load time, all turns",
            value=stall[0] / stall[1] if stall[1] else None,
            target=0.1,
            comparison="<=",
        ),
        Claim(
            name="largest margin where replies first differ",
            value=comparison["largest_margin_at_a_difference"],
            target=_MARGIN,
            comparison="<=",
            unit="logits",
        ),
        Claim(
            name="every prompt token accounted for",
            value=is_complete,
            target=True,
            comparison="==",
        ),
    ]


def _print(modes: Mapping[str, dict]) -> None:
    table = Table(title="Both modes", title_justify="left")
    table.add_column("")
    for mode in modes:
        table.add_column(mode, justify="right")

    def add(name: str, text) -> None:
        table.add_row(name, *[text(summary) for summary in modes.values()])

    add("turns", lambda m: str(m["num_turns"]))
    add("prompt tokens", lambda m: f"{m['prompt_tokens']:,}")
    for source in SOURCES:
        add(f"  {source}", lambda m: f"{m['tokens_from'][source]:,}")  # noqa: B023
    add("output tokens", lambda m: f"{m['output_tokens']:,}")
    for name in ("prefill_s_later_turns", "ttft_s_later_turns", "tpot_s"):
        for part in ("mean", "p95"):
            add(f"{name}, {part}, ms", lambda m: f"{1e3 * m[name][part]:.1f}")  # noqa: B023
    for name in ("prefill_total_s", "gpu_busy_s", "wall_s"):
        add(name, lambda m: f"{m[name]:.2f}")  # noqa: B023
    Console().print(table)
