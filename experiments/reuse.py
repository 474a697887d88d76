"""Claim: reusing the KV cache of earlier turns gives the same tokens far sooner.

Serves the same conversations twice on the same engine, once keeping the KV cache of
finished turns in three tiers and once recomputing it (paper, section 4.1). Every turn
of both modes has the same prompt; every token is compared.

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

from cachedattn_jax.engine.engine import Engine
from cachedattn_jax.engine.engine_config import EngineConfig
from cachedattn_jax.engine.turn import Turn
from cachedattn_jax.gantt import busiest_turn, draw_turn
from cachedattn_jax.model.config import LlamaConfig, preset
from cachedattn_jax.model.llama import init_params, weights_digest
from cachedattn_jax.run_directory import Claim, InvariantBroken, RunDirectory
from cachedattn_jax.store.budget import StoreConfig
from experiments.measures import SOURCES, compare_tokens, gains, mode_summary
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
    traces, events, counted = {}, {}, {}
    for mode in MODES:
        settings = dataclasses.replace(engine, reuse=mode)
        with Engine(config, params, settings, store, weights=weights) as served:
            said = replays[MODES[0]].turns if replays else None
            replays[mode] = play(console, served, played, mode, seed, time_factor, said)
            traces[mode] = served.timeline.chrome_trace()
            counted[mode] = {**served.totals.describe(), **served.stats().describe()}
            events[mode] = served.timeline.events
            page_tokens = served.store.layout.page_tokens
        rows = [turn.row() for turn in replays[mode].turns.values()]
        run_directory.append_turns([{"mode": mode, **row} for row in rows])
    run_directory.write_timeline(traces["cached"])

    ahead = counted["cached"]["others"].get("pages_fetched", 0) * page_tokens
    summary = _summary(played, config, replays, seed, ahead)
    summary["counters"] = counted
    _print_modes(console, summary["modes"])
    figures = {
        "Time to first token against history": plot_ttft(replays),
        "Where prompt tokens came from": _plot_sources(summary["modes"]),
        "The turn with most to load, layer group by layer group": draw_turn(
            events["cached"], busiest_turn(events["cached"])
        ),
    }
    write_report(run_directory, "Cached against recomputed", summary, figures)
    _check_tokens(summary["comparison"])
    return summary


def play(
    console: Console,
    engine: Engine,
    workload: Workload,
    mode: str,
    seed: int,
    time_factor: float,
    transcript: Mapping[TurnName, Turn] | None,
) -> Replayed:
    """Compiles all programs and plays a workload, with a bar for each."""
    with Progress(console=console) as progress:
        compiling = progress.add_task(f"{mode}: compile", total=None)
        engine.warm_up(
            lambda name, done, total: progress.update(
                compiling,
                description=f"{mode}: compile {name}",
                completed=done,
                total=total,
            )
        )
        progress.update(compiling, description=f"{mode}: programs compiled")
        serving = progress.add_task(f"{mode}: turns", total=workload.num_turns)
        return replay(
            engine,
            workload,
            seed=seed,
            time_factor=time_factor,
            transcript=transcript,
            on_turn=lambda turn: progress.advance(serving),
        )


def _summary(
    workload: Workload,
    config: LlamaConfig,
    replays: Mapping[str, Replayed],
    seed: int,
    num_fetched_ahead: int,
) -> dict:
    modes = {mode: mode_summary(replayed) for mode, replayed in replays.items()}
    cached, recompute = modes["cached"], modes["recompute"]
    tokens = compare_tokens(replays["cached"].turns, replays["recompute"].turns)
    comparison = {
        "tokens_identical": not tokens.differences,
        "turns_compared": tokens.num_turns,
        "tokens_compared": tokens.num_tokens,
        "ties": tokens.ties,
        "differences": tokens.differences,
        **gains(cached, recompute),
    }
    return {
        "workload": workload.describe(),
        "model": {**dataclasses.asdict(config), "parameters": config.num_parameters},
        "seed": seed,
        "modes": modes,
        "comparison": comparison,
        "tokens_fetched_ahead": num_fetched_ahead,
        "claims": _claims(cached, comparison, num_fetched_ahead),
    }


def _claims(cached: dict, comparison: dict, num_fetched_ahead: int) -> list[Claim]:
    sources = cached["tokens_from"]
    # What the queue had fetched from disk when its turn began counts as host there.
    from_disk = sources["disk"] + num_fetched_ahead
    from_tiers = min(sources["device"], sources["host"], from_disk)
    is_complete = sum(sources.values()) == cached["prompt_tokens"]
    identical = comparison["tokens_identical"]
    reduction = comparison["ttft_reduction_later_turns"]
    return [
        Claim(name="tokens identical", value=identical, target=True, comparison="=="),
        Claim(name="ties", value=len(comparison["ties"]), target=5, comparison="<="),
        Claim(
            name="every prompt token accounted for",
            value=is_complete,
            target=True,
            comparison="==",
        ),
        Claim(name="sessions", value=cached["num_sessions"], target=24),
        Claim(name="turns", value=cached["num_turns"], target=100),
        Claim(
            name="tokens from the least used tier, those fetched ahead from disk too",
            value=from_tiers,
            target=1,
            unit="tokens",
        ),
        Claim(
            name="TTFT reduction of later turns, no queueing",
            value=reduction,
            target=0.8,
        ),
        Claim(
            name="prefill speed-up",
            value=comparison["prefill_speedup"],
            target=1.0,
            unit="x",
        ),
    ]


def _check_tokens(comparison: dict) -> None:
    for difference in comparison["differences"]:
        raise InvariantBroken(
            f"token {difference.token_index} of turn {difference.place} of session"
            f" {difference.session_id} differs between the modes, and its two best"
            f" logits lie {difference.margin:.2g} apart"
        )


def _print_workload(console: Console, config: LlamaConfig, workload: Workload) -> None:
    facts = workload.describe()
    console.print(
        f"{facts['num_sessions']} conversations of {facts['name']} with"
        f" {facts['num_turns']} turns, message lengths times {workload.scale:g};"
        f" {config.num_parameters / 1e6:.1f} M parameters, window {config.window}"
    )


def _print_modes(console: Console, modes: Mapping[str, dict]) -> None:
    table = Table(title="Both modes, all times in ms", title_justify="left")
    table.add_column("")
    for mode in modes:
        table.add_column(mode, justify="right")

    def add(name: str, text) -> None:
        table.add_row(name, *[text(summary) for summary in modes.values()])

    def add_time(name: str, key: str) -> None:
        for part in ("mean", "p95"):
            add(f"{name}, {part}", lambda s: f"{1e3 * s[key][part]:.1f}")  # noqa: B023

    add("prompt tokens", lambda s: f"{s['prompt_tokens']:,}")
    for source in SOURCES:
        add(f"  {source}", lambda s: f"{s['tokens_from'][source]:,}")  # noqa: B023
    add("prefill tokens with padding", lambda s: f"{s['prefill_tokens_padded']:,}")
    add("hit rate", lambda s: f"{100 * s['hit_rate']:.1f} %")
    add_time("TTFT without queueing, later turns", "prefill_s_later_turns")
    add_time("TTFT with queueing, later turns", "ttft_s_later_turns")
    add_time("time per output token", "tpot_s")
    add("output tokens", lambda s: f"{s['output_tokens']:,}")
    add("wall time", lambda s: f"{1e3 * s['wall_s']:,.0f}")
    console.print(table)


def plot_ttft(replays: Mapping[str, Replayed]) -> Figure:
    """Each turn a dot: without the store the time grows with the history."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for mode, replayed in replays.items():
        turns = replayed.turns.values()
        axes.plot(
            [len(turn.prompt) for turn in turns],
            [1e3 * (turn.prefill_s or 0) for turn in turns],
            ".",
            label=mode,
        )
    axes.set(xlabel="prompt, tokens", ylabel="time to first token, ms", ylim=(0, None))
    axes.legend()
    return figure


def _plot_sources(modes: Mapping[str, dict]) -> Figure:
    figure, axes = plt.subplots(figsize=(7, 2), layout="constrained")
    for row, (_, summary) in enumerate(modes.items()):
        left = 0
        for color, source in enumerate(SOURCES):
            tokens = summary["tokens_from"][source]
            label = source if row == 0 else None
            axes.barh(row, tokens, left=left, color=f"C{color}", label=label)
            left += tokens
    axes.set(yticks=range(len(modes)), yticklabels=list(modes), xlabel="prompt tokens")
    axes.legend(ncols=len(SOURCES), loc="upper center", bbox_to_anchor=(0.5, 1.4))
    return figure
