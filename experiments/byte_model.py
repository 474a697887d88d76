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
from cachedattn_jax.model.layers import INIT_STDDEV
from cachedattn_jax.model.llama import LlamaParams, init_params, model_of
from experiments.training_text import Corpus, crop, retrieval_sample

# The first number of every embedding at the start, so that heads can ignore the rest.
_CONSTANT = 2.0
# Of the heads that look back: one byte gets nearly all of their weight.
_SHARPNESS = 2.0


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """A model and how it is trained.

    Attributes:
        window: tokens of context, in training and afterwards.
        retrieval_share: of the samples that are lines to be found again.
        learning_rate: at the peak; it warms up for 5 % of the steps and then falls
            along a cosine.
    """

    hidden_size: int = 256
    intermediate_size: int = 640
    num_layers: int = 4
    num_heads: int = 4
    window: int = 256
    batch_size: int = 16
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
    params: Any = initial(config)
    state = optimiser.init(params)
    step = _step_of(config.model, optimiser)
    rng = np.random.default_rng(config.seed)
    columns = [
        *Progress.get_default_columns()[:-1],
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    ]
    with Progress(*columns, console=console) as progress:
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


def initial(config: TrainingConfig) -> LlamaParams:
    """Random weights for a narrow model.

    Those of `init_params` suit wide ones: here the residual stream would hardly carry
    the token, and attention would be flat, for the first thousand steps.
    """
    params = init_params(config.model, config.seed)
    depth = (2 * config.num_layers) ** -0.5

    def scaled(path, x):
        if x.ndim < 2:
            return x
        name = jax.tree_util.keystr(path)
        is_last = "o_proj" in name or "down_proj" in name
        scale = x.shape[0] ** -0.5 / INIT_STDDEV * (depth if is_last else 1.0)
        return x * jnp.asarray(scale, x.dtype)

    layers = jax.tree_util.tree_map_with_path(scaled, params.layers)
    embedding = params.embedding * jnp.asarray(0.5 / INIT_STDDEV, jnp.float32)
    embedding = embedding.at[:, 0].set(_CONSTANT)
    first = _looking_back(config.model, layers[0])
    return dataclasses.replace(params, layers=(first, *layers[1:]), embedding=embedding)


def _looking_back(model: LlamaConfig, layer: dict) -> dict:
    """A first layer whose first two heads look one and two bytes back.

    Their scores are sums of cos((distance - d) * frequency) over the fast frequencies.
    A model that starts like this learns to find repetitions within hundreds of steps;
    left to itself it had not after a million bytes.
    """
    half = model.head_dim // 2
    fast = model.inverse_frequencies()[: half // 4]
    query = np.array(layer["attention"]["q_proj"]["kernel"])
    key = np.array(layer["attention"]["k_proj"]["kernel"])
    for head, distance in enumerate((1, 2)):
        start = head * model.head_dim
        for kernel, angles in ((query, 0 * fast), (key, distance * fast)):
            kernel[:, start : start + model.head_dim] = 0.0
            kernel[0, start : start + len(fast)] = _SHARPNESS * np.cos(angles)
            place = start + half
            kernel[0, place : place + len(fast)] = _SHARPNESS * np.sin(angles)
    attention = {
        **layer["attention"],
        "q_proj": {"kernel": jnp.asarray(query)},
        "k_proj": {"kernel": jnp.asarray(key)},
    }
    return {**layer, "attention": attention}


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
