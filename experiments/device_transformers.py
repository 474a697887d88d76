"""Claim: against `transformers` on the same device, a later turn starts far sooner.

A few conversations of real lengths, one turn at a time and alone on the device, with
the same shape of model and random weights. `transformers` computes the whole prompt
each turn, or keeps a conversation's cache in device memory, which it can for one
conversation and not for many; ours recomputes, loads the history from pinned host
memory at each turn, or finds it on the device. Of a reply the first tokens are decoded
and timed; the rest is made up, and put into the caches without being timed.

    cachedattn run configs/h200.gin --gin_bindings 'device.run.only = ("transformers",)'

It needs room for a second copy of the weights: XLA_PYTHON_CLIENT_PREALLOCATE=false.
"""

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from cachedattn_jax.engine.engine import Engine
from cachedattn_jax.engine.engine_config import EngineConfig
from cachedattn_jax.model.config import LlamaConfig, preset
from cachedattn_jax.model.llama import init_params
from cachedattn_jax.run_directory import Claim, RunDirectory
from cachedattn_jax.store.budget import StoreConfig
from cachedattn_jax.store.placement.tier import Tier
from experiments.bench import noise, serve, submit, to_tier
from experiments.workload import Workload

_THEIRS = ("recompute", "keeps its cache")
_OURS = {"recompute": "never", "from host memory": "always", "on the device": "always"}
# Turns: new tokens, how many of the reply are decoded, and the rest of the reply.
Conversation = list[tuple[list[int], int, list[int]]]


def run(
    run_directory: RunDirectory,
    *,
    workload: Workload,
    model: str = "llama-3-8b",
    window: int | None = None,
    engine: EngineConfig = EngineConfig(),
    store: StoreConfig = StoreConfig(),
    max_reply: int = 16,
    program: str = "experiments.hugging_face_turns",
    seed: int = 0,
    seconds: float = math.inf,
) -> dict:
    """Serves the conversations in every way.

    Args:
        max_reply: tokens of a reply that are decoded.
        program: the module that serves them with `transformers`.
        seconds: that the other program may take.
    """
    overrides = {} if window is None else {"window": window}
    config = preset(model, dtype="bfloat16", **overrides)
    played = workload.scaled(1.0, config.window - 1)
    conversations = _conversations(played, config.vocab_size, max_reply, seed)
    theirs = _theirs(program, config, conversations, seconds)
    rows = {f"transformers, {mode}": theirs.pop(mode) for mode in _THEIRS}
    params = init_params(config, seed)
    for way, loading in _OURS.items():
        settings = EngineConfig(**{**vars(engine), "loading": loading})
        with Engine(config, params, settings, store, weights="random") as served:
            served.warm_up()
            rows[f"ours, {way}"] = _ours(served, conversations, way)
    medians = {name: _medians(turns) for name, turns in rows.items()}
    _print(model, medians)
    return {
        "model": model,
        "num_conversations": len(conversations),
        "versions": theirs,
        "ways": medians,
        "turns": rows,
        "claims": _claims(medians),
    }


def _conversations(
    played: Workload, vocab_size: int, max_reply: int, seed: int
) -> list[Conversation]:
    rng = np.random.default_rng(seed)
    conversations = []
    for conversation in played.conversations:
        turns = []
        for place, turn in enumerate(conversation.turns):
            message = played.prompt(conversation, place, vocab_size, seed)
            timed = min(max_reply, turn.output_tokens)
            rest = noise(rng, turn.output_tokens - timed, vocab_size)
            turns.append((np.asarray(message).tolist(), timed, rest))
        conversations.append(turns)
    return conversations


def _theirs(
    program: str,
    config: LlamaConfig,
    conversations: Sequence[Conversation],
    seconds: float,
) -> dict:
    """What the other program measured.

    Raises:
        RuntimeError: with its last words, if it fails.
        TimeoutExpired: it took too long.
    """
    asked = {
        "conversations": conversations,
        "weight_bytes": 2 * config.num_parameters,
        "config": {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "max_position_embeddings": config.window,
        },
    }
    command = [sys.executable, "-m", program]
    done = subprocess.run(
        command,
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=None if math.isinf(seconds) else seconds,
    )
    if done.returncode:
        raise RuntimeError(f"{program} failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _ours(
    served: Engine, conversations: Sequence[Conversation], way: str
) -> list[dict]:
    rows = []
    for number, conversation in enumerate(conversations):
        said: list[int] = []
        for message, num_tokens, rest in conversation:
            prompt = [*said, *message]
            if way != "on the device":
                to_tier(served, Tier.HOST)
            turn = submit(served, f"{number}", prompt, num_tokens)
            serve(served)
            rows.append(
                {
                    "prompt": len(prompt),
                    "new": len(message),
                    "ttft_s": turn.prefill_s,
                    "tpot_s": turn.tpot_s,
                }
            )
            said = [*prompt, *turn.reply, *rest]
            if rest:
                submit(served, f"{number}", said)
                serve(served)
    return rows


def _medians(turns: Sequence[Mapping]) -> dict[str, float]:
    """Over later turns, those whose prompt has a history."""
    later = [turn for turn in turns if turn["prompt"] > turn["new"]]
    return {
        "later_turns": len(later),
        "prompt_tokens": float(np.mean([turn["prompt"] for turn in later])),
        "ttft_s": statistics.median(turn["ttft_s"] for turn in later),
        "tpot_s": statistics.median(turn["tpot_s"] for turn in later if turn["tpot_s"]),
    }


def _claims(medians: Mapping[str, dict]) -> list[Claim]:
    host = medians["ours, from host memory"]
    theirs = medians["transformers, recompute"]
    return [
        Claim(
            name="TTFT of later turns: transformers recomputing over ours from host",
            value=theirs["ttft_s"] / host["ttft_s"],
            target=2.0,
            unit="x",
        ),
        Claim(
            name="TTFT of later turns: ours from host over transformers keeping all",
            value=host["ttft_s"] / medians["transformers, keeps its cache"]["ttft_s"],
            target=1.5,
            comparison="<=",
            unit="x",
        ),
        Claim(
            name="time per token: transformers over ours",
            value=theirs["tpot_s"] / host["tpot_s"],
            target=1.0,
            unit="x",
        ),
    ]


def _print(model: str, medians: Mapping[str, dict]) -> None:
    table = Table(title=f"{model}, later turns, one at a time", title_justify="left")
    for name in ("way", "turns", "prompt tokens", "TTFT, ms", "per token, ms"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for name, median in medians.items():
        table.add_row(
            name,
            str(median["later_turns"]),
            f"{median['prompt_tokens']:,.0f}",
            f"{1e3 * median['ttft_s']:.1f}",
            f"{1e3 * median['tpot_s']:.2f}",
        )
    Console().print(table)
