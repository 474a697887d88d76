"""A small byte-level Llama that has learnt something, trained once and kept.

Knows training. Does not know what the model is used for, nor pages.
"""

import dataclasses
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from cachedattn_jax.model.checkpoint import load_checkpoint, save_checkpoint
from cachedattn_jax.model.config import LlamaConfig
from cachedattn_jax.model.llama import LlamaParams, model_of
from experiments.initial_params import initial_params
from experiments.training_text import Corpus, crop, retrieval_sample

# Steps whose losses are read, and shown, at once.
_SHOWN_TOGETHER = 20


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """A model and how it is trained.

    Attributes:
        window: tokens of context, in training and afterwards.
        lines_share: of the samples that are lines to be found again.
        learning_rate: at the peak; it warms up for 5 % of the steps and then falls
            along a cosine.
    """

    hidden_size: int = 256
    intermediate_size: int = 512
    num_layers: int = 3
    num_heads: int = 4
    window: int = 256
    batch_size: int = 4
    num_steps: int = 3600
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    lines_share: float = 0.125
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.lines_share <= 1:
            raise ValueError(f"lines_share={self.lines_share} must lie between 0 and 1")
        _ = self.model  # raises for sizes that do not fit together

    @property
    def model(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=256,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=self.hidden_size // self.num_heads,
            window=self.window,
        )


def trained(
    config: TrainingConfig, corpus: Corpus, folder: Path
) -> tuple[LlamaConfig, LlamaParams]:
    """The trained model: read from a checkpoint in the folder, or trained and kept."""
    path = folder / f"byte-llama-{_digest(config, corpus)}"
    console = Console()
    if (path / "model.json").exists():
        console.print(f"the model is that of {path}", highlight=False)
        return load_checkpoint(path)
    params = _train(config, corpus, console)
    save_checkpoint(path, config.model, params)
    return config.model, params


def _digest(config: TrainingConfig, corpus: Corpus) -> str:
    digest = hashlib.blake2b(repr(dataclasses.astuple(config)).encode(), digest_size=6)
    digest.update(corpus.training.tobytes())
    return digest.hexdigest()


def _train(config: TrainingConfig, corpus: Corpus, console: Console) -> LlamaParams:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.num_steps // 20 + 1, config.num_steps
    )
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.98, weight_decay=config.weight_decay),
    )
    params: Any = initial_params(config.model, config.seed)
    state = optimiser.init(params)
    step = _step_of(config.model, optimiser)
    rng = np.random.default_rng(config.seed)
    columns = [
        *Progress.get_default_columns(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[learnt]}"),
    ]
    # optax mixes counters and floats.
    promotion = jax.numpy_dtype_promotion("standard")
    with promotion, Progress(*columns, console=console) as progress:
        task = progress.add_task(
            f"train {config.model.num_parameters / 1e6:.1f} M parameters",
            total=config.num_steps,
            learnt="",
        )
        recent: list = []
        for _ in range(config.num_steps):
            batch = make_batch(config, corpus.training, rng)
            params, state, measured = step(params, state, *batch)
            recent.append(measured)
            if len(recent) == _SHOWN_TOGETHER:
                nats, num_found, num_asked = np.sum(jax.device_get(recent), axis=0)
                found = 100 * num_found / max(num_asked, 1)
                learnt = f"{nats / len(recent):.2f} nats, lines {found:.0f} %"
                progress.update(task, learnt=learnt)
                recent.clear()
            progress.advance(task)
    return params


def make_batch(
    config: TrainingConfig, text: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bytes, which of them are text to be learnt, and which the answers to lines.

    Returns:
        int32 and twice bool [batch, window + 1]. Names are neither: nobody knows them.
    """
    size = config.window + 1
    tokens = np.zeros((config.batch_size, size), np.int32)
    is_text = np.zeros((config.batch_size, size), bool)
    is_answer = np.zeros((config.batch_size, size), bool)
    for row in range(config.batch_size):
        if rng.random() < config.lines_share:
            tokens[row], is_answer[row] = retrieval_sample(rng, text, size)
        else:
            tokens[row], is_text[row] = crop(rng, text, size), True
    return tokens, is_text, is_answer


def _step_of(model: LlamaConfig, optimiser):
    """The jitted training step."""

    def mean(values, where):
        return jnp.where(where, values, 0.0).sum() / jnp.maximum(where.sum(), 1)

    def loss_of(params, tokens, is_text, is_answer):
        logits, asked = model_of(model, params)(tokens[:, :-1]), tokens[:, 1:]
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, asked)
        text, lines = mean(nats, is_text[:, 1:]), mean(nats, is_answer[:, 1:])
        is_found = (logits.argmax(-1) == asked) & is_answer[:, 1:]
        return text + lines, (text, is_found.sum(), is_answer[:, 1:].sum())

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, *batch):
        gradient, measured = jax.grad(loss_of, has_aux=True)(params, *batch)
        updates, state = optimiser.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, measured

    return step
