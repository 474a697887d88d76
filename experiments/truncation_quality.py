"""Claim: a truncated conversation that keeps its cache is as good as one recomputed.

A small byte-level Llama is trained on the documentation of the standard library (once;
the checkpoint is kept beside the run). Then text longer than its window is scored when,
each time the window is full, the first half of it is dropped and

    ours       the cache of the rest is kept, at its new positions
    TT         the rest is computed anew from its text
    NKVT       the cache of the rest is kept, its keys at their old positions
    sinks      page after page is dropped, except the first: a sliding window with sinks

Section 4.7 of the paper: perplexity 5.47 / 5.48 / 2199 of the first three, and 66.0 /
65.9 / 12.0 % of LongEval, which asks for a line that survived.

    cachedattn run configs/truncation_quality.gin      2 CPU cores, about 20 minutes

Expected: perplexity of ours within 1 % of TT, retrieval within 2 points.
"""

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cachedattn_jax.engine.truncation import TruncationConfig
from cachedattn_jax.run_directory import Claim, RunDirectory
from experiments.byte_model import TrainingConfig, trained
from experiments.report import write_report
from experiments.training_text import (
    LINE_BYTES,
    as_bytes,
    crop,
    make_lines,
    read_corpus,
)
from experiments.truncated_scores import Scorer


def run(
    run_directory: RunDirectory,
    *,
    training: TrainingConfig = TrainingConfig(),
    checkpoints: str = "runs/checkpoints",
    text_file: str | None = None,
    page_tokens: int = 16,
    ratio: float = 0.5,
    num_texts: int = 24,
    windows_per_text: int = 6,
    num_questions: int = 200,
    num_lines: int = 8,
    seed: int = 0,
) -> dict[str, object]:
    """Trains or loads the model, then scores all policies on the same texts.

    Args:
        checkpoints: folder where the trained model is kept and found again.
        text_file: any UTF-8 text to score beside the held-out documentation.
        num_texts: pieces of each text, of `windows_per_text` windows.
        num_questions: lines asked for, each after a conversation of its own.
    """
    corpus = read_corpus()
    texts = {"held-out documentation": corpus.held_out}
    if text_file is not None:
        texts[Path(text_file).name] = _read(text_file)
    model, params = trained(training, corpus, Path(checkpoints))
    policies = _policies(ratio, model.window, page_tokens)
    scorer = Scorer(model, params, page_tokens=page_tokens)
    rng = np.random.default_rng(seed)
    size = windows_per_text * model.window
    try:
        perplexities, after = {}, {}
        for name, text in texts.items():
            pieces = [crop(rng, text, size + 1) for _ in range(num_texts)]
            nats = {
                policy: _nats(scorer, pieces, config, f"{policy}, {name}")
                for policy, config in policies.items()
            }
            perplexities[name] = {
                policy: float(np.exp(values[:, model.window :].mean()))
                for policy, values in nats.items()
            }
            after[name] = {policy: values.mean(0) for policy, values in nats.items()}
        questions = [
            _question(rng, corpus.held_out, model.window, num_lines)
            for _ in range(num_questions)
        ]
        found = {
            policy: _found(scorer, questions, config, policy)
            for policy, config in policies.items()
        }
    finally:
        scorer.close()
    retrieval = {policy: float(hits.mean()) for policy, hits in found.items()}
    summary = {
        "parameters": model.num_parameters,
        "window": model.window,
        "bytes_scored": num_texts * (size - model.window),
        "perplexity": perplexities,
        "retrieval": retrieval,
        "questions": num_questions,
        "claims": _claims(perplexities, retrieval),
    }
    _print(perplexities, retrieval)
    figures = {"Nats a byte along a text": _plot(after, model.window)}
    write_report(run_directory, "Quality after truncation", summary, figures)
    return summary


def _policies(
    ratio: float, window: int, page_tokens: int
) -> dict[str, TruncationConfig]:
    return {
        "ours": TruncationConfig(ratio=ratio),
        "TT": TruncationConfig(policy="truncate_tokens_recompute", ratio=ratio),
        "NKVT": TruncationConfig(policy="naive", ratio=ratio),
        "sinks": TruncationConfig(ratio=page_tokens / window, keep_first_pages=1),
    }


def _read(path: str) -> np.ndarray:
    try:
        return as_bytes(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"text_file={path!r} cannot be read: {error}") from error


def _nats(
    scorer: Scorer, texts: list[np.ndarray], policy: TruncationConfig, name: str
) -> np.ndarray:
    """float64 [texts, bytes], of every byte given those in its context."""
    found = []
    for text in track(texts, description=name, transient=True):
        logits = scorer.logits(text[:-1], policy).astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        totals = np.log(np.exp(logits).sum(-1))
        found.append(totals - logits[np.arange(len(logits)), text[1:]])
    return np.stack(found)


def _question(
    rng: np.random.Generator, text: np.ndarray, window: int, num_lines: int
) -> np.ndarray:
    """A conversation that ends with a line that it had before.

    The window overflows between the lines and the question; the lines stay.
    """
    lines = make_lines(rng, num_lines)
    before = crop(rng, text, window // 2 + int(rng.integers(1, 17)))
    room = window - len(before) - lines.size
    between = crop(rng, text, room + int(rng.integers(1, 33)))
    asked = lines[rng.integers(num_lines)]
    return np.concatenate([before, lines.ravel(), between, asked[: LINE_BYTES - 1]])


def _found(
    scorer: Scorer, questions: list[np.ndarray], policy: TruncationConfig, name: str
) -> np.ndarray:
    """Whether the model says the value that each question ends with."""
    hits = []
    for question in track(questions, description=f"{name}, lines", transient=True):
        logits = scorer.logits(question[:-1], policy)
        hits.append(bool(logits[-1].argmax() == question[-1]))
    return np.asarray(hits)


def _claims(
    perplexities: Mapping[str, Mapping[str, float]], retrieval: Mapping[str, float]
) -> list[Claim]:
    claims = []
    for name, found in perplexities.items():
        claims += [
            Claim(
                name=f"perplexity of ours over TT, {name}",
                value=found["ours"] / found["TT"],
                target=1.01,
                comparison="<=",
                unit="x",
            ),
            Claim(
                name=f"perplexity of NKVT over TT, {name}",
                value=found["NKVT"] / found["TT"],
                target=5.0,
                unit="x",
            ),
        ]
    return [
        *claims,
        Claim(
            name="retrieval of ours below TT",
            value=100 * (retrieval["TT"] - retrieval["ours"]),
            target=2.0,
            comparison="<=",
            unit="points",
        ),
        # Two models that know nothing would agree, too.
        Claim(
            name="retrieval of TT",
            value=100 * retrieval["TT"],
            target=50.0,
            unit="%",
        ),
    ]


def _print(
    perplexities: Mapping[str, Mapping[str, float]], retrieval: Mapping[str, float]
) -> None:
    table = Table(title="After truncation", title_justify="left")
    table.add_column("")
    for policy in retrieval:
        table.add_column(policy, justify="right")
    for name, found in perplexities.items():
        table.add_row(
            f"perplexity a byte, {name}", *[f"{value:.3f}" for value in found.values()]
        )
    table.add_row("lines found", *[f"{100 * v:.1f} %" for v in retrieval.values()])
    Console().print(table)


def _plot(after: Mapping[str, Mapping[str, np.ndarray]], window: int) -> Figure:
    """A jump at every truncation is what it costs."""
    figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    for policy, nats in next(iter(after.values())).items():
        smooth = nats[: len(nats) // 32 * 32].reshape(-1, 32).mean(1)
        axes.plot(32 * np.arange(len(smooth)) / window, smooth, label=policy)
    axes.set(xlabel="text, windows", ylabel="nats a byte", ylim=(0, None))
    axes.legend()
    return figure
