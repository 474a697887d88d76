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
from rich.progress import Progress, TextColumn, TimeRemainingColumn

from cachedattn_jax.model.checkpoint import load_checkpoint, save_checkpoint
from cachedattn_jax.model.config import LlamaConfig
from cachedattn_jax.model.llama import LlamaParams, model_of
from experiments.initial_params import initial_params
from experiments.training_text import Corpus, crop, retrieval_sample


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """A model and how it is trained.

    Attributes:
        window: tokens of context, in training and afterwards.
        retrieval_share: of the samples that are lines to be found again.
        learning_rate: at the peak; it warms up for 5 % of the steps and then falls
            along a cosine.
    """

    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 3
    num_heads: int = 2
    window: int = 256
    batch_size: int = 8
    num_steps: int = 1500
    learning_rate: float = 2e-3
    retrieval_share: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.retrieval_share <= 1:
            raise ValueError(
                f"retrieval_share={self.retrieval_share} must lie between 0 and 1"
            )
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
        optax.adamw(schedule, b2=0.98, weight_decay=0.01),
    )
    params: Any = initial_params(config.model, config.seed)
    state = optimiser.init(params)
    step = _step_of(config.model, optimiser)
    rng = np.random.default_rng(config.seed)
    columns = [
        *Progress.get_default_columns()[:-1],
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    ]
    # optax mixes counters and floats.
    promotion = jax.numpy_dtype_promotion("standard")
    with promotion, Progress(*columns, console=console) as progress:
        task = progress.add_task(
            f"train {config.model.num_parameters / 1e6:.1f} M parameters",
            total=config.num_steps,
            loss="",
        )
        for number in range(config.num_steps):
            tokens, weights, num_text = make_batch(config, corpus.training, rng)
            params, state, losses = step(params, state, tokens, weights, num_text)
            loss = ""
            if number % 20 == 0:
                text, lines = map(float, losses)
                loss = f"text {text:.2f}, lines {lines:.2f} nats a byte"
                progress.update(task, loss=loss)
            progress.advance(task)
    return params


def make_batch(
    config: TrainingConfig, text: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, int]:
    """int32 and float32 [batch, window + 1]: bytes, and how much each counts.

    In samples of lines only what is repeated counts: the rest is noise or text.

    Returns:
        How many of the first samples are text, too.
    """
    size = config.window + 1
    num_text = round(config.batch_size * (1 - config.retrieval_share))
    tokens = np.zeros((config.batch_size, size), np.int32)
    weights = np.zeros((config.batch_size, size), np.float32)
    for row in range(config.batch_size):
        if row < num_text:
            tokens[row], weights[row] = crop(rng, text, size), 1.0
        else:
            tokens[row], weights[row] = retrieval_sample(rng, text, size)
    return tokens, weights, num_text


def _step_of(model: LlamaConfig, optimiser):
    """The jitted training step."""

    def loss_of(params, tokens, weights, num_text):
        logits = model_of(model, params)(tokens[:, :-1])
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        nats = nats * weights[:, 1:]
        parts = [
            part.sum() / jnp.maximum(weight.sum(), 1.0)
            for part, weight in (
                (nats[:num_text], weights[:num_text, 1:]),
                (nats[num_text:], weights[num_text:, 1:]),
            )
        ]
        return parts[0] + parts[1], parts

    @functools.partial(jax.jit, static_argnums=4, donate_argnums=(0, 1))
    def step(params, state, tokens, weights, num_text):
        (_, losses), gradient = jax.value_and_grad(loss_of, has_aux=True)(
            params, tokens, weights, num_text
        )
        updates, state = optimiser.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, losses

    return step
