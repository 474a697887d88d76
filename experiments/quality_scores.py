"""What logits say of a truncation policy: nats a token, and which lines are found.

Knows texts, questions and a scorer. Does not know policies apart or what is claimed.
"""

from collections.abc import Sequence

import numpy as np
from rich.progress import track

from cachedattn_jax.engine.truncation import TruncationConfig
from experiments.token_texts import Question
from experiments.truncated_scores import Scorer


def nats_of(
    scorer: Scorer, texts: Sequence[np.ndarray], policy: TruncationConfig, name: str
) -> np.ndarray:
    """float64 [texts, tokens], of every token given those in its context."""
    found = []
    for text in track(texts, description=name, transient=True):
        logits = scorer.logits(text[:-1], policy).astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        totals = np.log(np.exp(logits).sum(-1))
        found.append(totals - logits[np.arange(len(logits)), text[1:]])
    return np.stack(found)


def nats_of_frequencies(
    training: np.ndarray, texts: Sequence[np.ndarray], vocab_size: int
) -> np.ndarray:
    """The same where nothing is known but how often a token occurs in the training."""
    counts = np.bincount(training, minlength=vocab_size) + 1.0
    nats = -np.log(counts / counts.sum())
    return np.stack([nats[text[1:]] for text in texts])


def lines_found(
    scorer: Scorer,
    questions: Sequence[Question],
    policy: TruncationConfig,
    name: str,
) -> np.ndarray:
    """bool [questions], whether the model says the value that each ends with."""
    hits = []
    for question in track(questions, description=f"{name}, lines", transient=True):
        logits = scorer.logits(question.token_ids[:-1], policy)
        answer = question.token_ids[-question.num_answer :]
        said = logits[-question.num_answer :].argmax(-1)
        hits.append(bool((said == answer).all()))
    return np.asarray(hits)
