"""Claim: saving in the background takes the save time off the critical path.

Turns run one after the other; each has a prompt and a reply, all of whose pages are
saved over an emulated link in 0.8 of the time that the reply takes. Saved
synchronously, a turn waits at its end until they have left (the baseline of the paper,
section 3.2.2); saved asynchronously, they leave layer group by layer group while the
turn computes; and for comparison nothing is saved. Fig. 20 of the paper, 20 decode
steps: 13 to 15 % less time at prompts of 1,000 to 1,600 tokens.

Replies are longer here, 64 tokens: on a CPU, taking pages out of their slots is work of
the cores that compute, 5 to 20 ms a turn, which no accelerator would notice and which
would weigh more than the link in short turns.

    cachedattn run configs/overlap_save.gin        2 CPU cores, about 2 minutes

Expected: at least 90 % of the synchronous save time gone from the critical path.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from cachedattn_jax.engine.engine import Engine
from cachedattn_jax.engine.engine_config import EngineConfig
from cachedattn_jax.model.config import preset
from cachedattn_jax.model.llama import init_params
from cachedattn_jax.run_directory import Claim, RunDirectory
from cachedattn_jax.store.budget import StoreConfig
from cachedattn_jax.store.link import EmulatedLink
from experiments.bench import noise, repeat, serve, submit
from experiments.deadline import Deadline
from experiments.report import write_report

MODES = ("not saved", "synchronous", "asynchronous")


def run(
    run_directory: RunDirectory,
    *,
    model: str = "small",
    dtype: str = "float32",
    engine: EngineConfig = EngineConfig(max_batch=1),
    store: StoreConfig = StoreConfig(device_bytes="320 MiB", host_bytes="256 MiB"),
    prompts: tuple[int, ...] = (256, 512, 768, 1024),
    reply: int = 64,
    num_turns: int = 2,
    save_over_decode: float | None = 0.8,
    repeats: int = 5,
    seed: int = 0,
    seconds: float = math.inf,
) -> dict[str, object]:
    """Serves turns one after the other in every mode.

    Args:
        prompts: tokens of a prompt; a row of the table each.
        reply: tokens of a reply.
        num_turns: turns of one trial.
        save_over_decode: time of saving a turn's pages, of that of decoding its reply;
            None to measure the machine's own link.
        seconds: that it may take; what would take longer is left out.
    """
    deadline = Deadline(seconds)
    config = preset(model, dtype=dtype)
    params = init_params(config, seed)
    rng = np.random.default_rng(seed)
    engines = {mode: _engine(config, params, engine, store, mode) for mode in MODES}
    kind = "measured" if save_over_decode is None else "emulated"
    layout = engines["asynchronous"].store.layout

    def trial(mode: str, num_tokens: int, link: EmulatedLink | None) -> float:
        served = engines[mode]
        served.store.saver.drain()
        for index in range(num_turns):  # what an earlier trial left is no part of it
            served.forget("default", f"s{index}")
        served.store.links.emulate(link, None)
        messages = [noise(rng, num_tokens, config.vocab_size) for _ in range(num_turns)]
        started = time.monotonic()
        for index, prompt in enumerate(messages):
            submit(served, f"s{index}", prompt, reply)
            serve(served)
        return time.monotonic() - started

    rows = []
    try:
        for num_tokens in deadline.over(prompts, "prompt of"):
            save_s, link = None, None
            if save_over_decode is not None:
                decode_s = _decode_s(engines["not saved"], rng, num_tokens, reply)
                num_bytes = layout.num_pages(num_tokens + reply - 1) * layout.page_bytes
                save_s = save_over_decode * decode_s
                link = EmulatedLink(bytes_per_s=num_bytes / save_s)
            trials = {
                mode: functools.partial(trial, mode, num_tokens, link) for mode in MODES
            }
            what = f"prompts of {num_tokens} tokens"
            times = repeat(trials, repeats, what, deadline)
            rows.append(_row(num_tokens, save_s, num_turns, times))
        run_directory.write_timeline(engines["asynchronous"].timeline.chrome_trace())
        waits = engines["asynchronous"].store.counters["save_wait_us"]
    finally:
        for served in engines.values():
            served.store.links.emulate(None, None)
            served.close()
    summary = {
        "model": model,
        "reply_tokens": reply,
        "rows": rows,
        "save_wait_s": waits / 1e6,
        "left_out": deadline.left_out,
        "claims": [
            Claim(
                name=f"prompt {row['prompt_tokens']}: save time off the critical path",
                value=row["removed"],
                target=0.9,
                kind=kind,
            )
            for row in rows
        ],
    }
    _print(rows, kind)
    figures = {"Time of a turn": _plot(rows)}
    write_report(run_directory, f"Saving, {kind} link", summary, figures)
    return summary


def _engine(config, params, engine, store: StoreConfig, mode: str) -> Engine:
    saving = dataclasses.replace(
        store,
        host_bytes=0 if mode == "not saved" else store.host_bytes,
        is_saving_synchronous=mode == "synchronous",
    )
    served = Engine(config, params, engine, saving, weights="random")
    served.warm_up()
    return served


def _decode_s(served: Engine, rng, num_tokens: int, reply: int) -> float:
    """Time from the first token of a reply to the last."""
    spans = []
    for _ in range(3):
        prompt = noise(rng, num_tokens, served.model.vocab_size)
        turn = submit(served, "probe", prompt, reply)
        serve(served)
        spans.append((turn.tpot_s or 0.0) * (reply - 1))
    return min(spans)


def _row(num_tokens: int, save_s: float | None, num_turns: int, times: dict) -> dict:
    """Medians over the rounds, each difference taken within a round.

    On the machine's own link the save time is what saving synchronously adds.
    """
    none, waits, hides = (np.asarray(times[mode]) for mode in MODES)
    if save_s is None:
        save_s = float(np.median(waits - none)) / num_turns
    return {
        "prompt_tokens": num_tokens,
        "save_s": save_s,
        "turn_s": {mode: statistics.median(times[mode]) / num_turns for mode in MODES},
        "less_time": float(np.median(1 - hides / waits)),
        "removed": float(np.median((waits - hides) / (waits - none))),
    }


def _print(rows: Sequence[dict], kind: str) -> None:
    table = Table(title=f"A turn in ms, {kind} link (medians)", title_justify="left")
    for name in ("prompt", "save", "none", "sync", "async", "less time", "removed"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row["prompt_tokens"]),
            f"{1e3 * row['save_s']:.1f}",
            *[f"{1e3 * row['turn_s'][mode]:.1f}" for mode in MODES],
            f"{100 * row['less_time']:.1f} %",
            f"{100 * row['removed']:.1f} %",
        )
    Console().print(table)


def _plot(rows: Sequence[dict]) -> Figure:
    """Fig. 20 of the paper: bars of the three modes for each prompt."""
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    places = np.arange(len(rows))
    for index, mode in enumerate(MODES):
        heights = [1e3 * row["turn_s"][mode] for row in rows]
        axes.bar(places + 0.27 * (index - 1), heights, width=0.25, label=mode)
    axes.set_xticks(places, [str(row["prompt_tokens"]) for row in rows])
    axes.set(xlabel="prompt, tokens", ylabel="time of a turn, ms")
    axes.legend()
    return figure
