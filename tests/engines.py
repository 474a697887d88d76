"""Engines on the tiny model, and the answer they must give.

The answer is independent of pages, pools and stores: the dense model run over the whole
conversation again for every token.
"""

import dataclasses
import functools
import time
from concurrent.futures import Future
from typing import Literal

import jax
import numpy as np

from cachedattn_jax.engine.engine import Engine
from cachedattn_jax.engine.engine_config import EngineConfig
from cachedattn_jax.engine.request import Request
from cachedattn_jax.engine.turn import Turn
from cachedattn_jax.model.config import LlamaConfig, preset
from cachedattn_jax.model.llama import LlamaParams, init_params, model_of
from cachedattn_jax.store.budget import StoreConfig
from cachedattn_jax.store.link import Link
from cachedattn_jax.store.placement.tier import Tier

PAGE_TOKENS = (4, 16)
LAYERS_PER_GROUP = (1, 2, 4)


class HeldLink(Link):
    """One whose copies arrive when they are let go, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.num_free = 0
        self.held: list[Future[float]] = []

    def carry(self, num_bytes, done, after=None):
        held: Future[float] = Future()
        self.held.append(held)
        self.let_go(0)
        return super().carry(num_bytes, held, after)

    def let_go(self, count: int) -> None:
        self.num_free += count
        for held in self.held[: self.num_free]:
            if not held.done():
                held.set_result(time.monotonic())


@functools.cache
def tiny_model(
    dtype: str = "float32", head_dim: int = 16
) -> tuple[LlamaConfig, LlamaParams]:
    config = preset("tiny", window=96, dtype=dtype, head_dim=head_dim)
    return config, init_params(config, seed=0)


def page_bytes(config: LlamaConfig, page_tokens: int) -> int:
    item_bytes = 4 if config.dtype == "float32" else 2
    per_token = config.num_layers * config.num_kv_heads * 2 * config.head_dim
    return page_tokens * per_token * item_bytes


def make_engine(
    *,
    page_tokens: int = 4,
    layers_per_group: int = 2,
    max_batch: int = 2,
    chunk_tokens: tuple[int, ...] = (8, 32),
    reuse: Literal["cached", "recompute"] = "cached",
    device_pages: int | None = None,
    host_pages: int = 1000,
    disk_pages: int = 0,
    disk_root: str | None = None,
    dtype: str = "float32",
    head_dim: int = 16,
    kernel: str = "auto",
    **options,
) -> Engine:
    """An engine whose budgets are given in pages.

    Args:
        options: other fields of EngineConfig and StoreConfig.
    """
    of_store = {f.name for f in dataclasses.fields(StoreConfig)} & options.keys()
    store = {name: options.pop(name) for name in of_store}
    config, params = tiny_model(dtype, head_dim)
    size = page_bytes(config, page_tokens)
    window_pages = -(-config.window // page_tokens)
    return Engine(
        config,
        params,
        EngineConfig(
            page_tokens=page_tokens,
            layers_per_group=layers_per_group,
            max_batch=max_batch,
            chunk_tokens=chunk_tokens,
            reuse=reuse,
            prefill_kernel=kernel,
            decode_kernel=kernel,
            interpret_kernels=kernel != "auto",
            **options,
        ),
        StoreConfig(
            device_bytes=size * (device_pages or (max_batch + 2) * window_pages),
            host_bytes=size * host_pages,
            # An object is a page and its header.
            disk_bytes=disk_pages * (size + 2048),
            disk_root=disk_root,
            **store,
        ),
        weights="tiny",
    )


@functools.cache
def _dense(dtype: str, head_dim: int):
    config, params = tiny_model(dtype, head_dim)
    return jax.jit(model_of(config, params))


def dense_logits(
    token_ids, dtype: str = "float32", *, head_dim: int = 16
) -> np.ndarray:
    """[tokens, vocab] of the dense model, padded so that it compiles once."""
    config, _ = tiny_model(dtype, head_dim)
    padded = np.zeros((1, config.window), np.int32)
    padded[0, : len(token_ids)] = token_ids
    return np.asarray(_dense(dtype, head_dim)(padded))[0, : len(token_ids)]


def greedy_reply(
    prompt, num_tokens: int, *, head_dim: int = 16
) -> tuple[list[int], list[float]]:
    """The reply of the dense model, and each choice's margin over the second best."""
    token_ids, margins = [int(token) for token in prompt], []
    for _ in range(num_tokens):
        logits = dense_logits(token_ids, head_dim=head_dim)[-1]
        second, best = np.sort(logits)[-2:]
        margins.append(float(best - second))
        token_ids.append(int(np.argmax(logits)))
    return token_ids[len(prompt) :], margins


def assert_same_reply(reply, expected, margins) -> None:
    """Equal tokens, up to the first choice whose two best logits lie within 1e-4."""
    for got, wanted, margin in zip(reply, expected, margins, strict=True):
        if margin < 1e-4:
            return
        assert got == wanted, (reply, expected, margins)


def ask(engine: Engine, session_id: str, token_ids, max_tokens: int = 4, **kwargs):
    """Serves one turn and returns it."""
    request = Request(
        session_id=session_id,
        token_ids=tuple(token_ids),
        max_tokens=max_tokens,
        **kwargs,
    )
    (turn,) = engine.run([request])
    assert turn.error is None, turn.error
    assert turn.tokens_from.total == len(turn.prompt)
    return turn


def stored(turn: Turn) -> Future[None]:
    """When the record of a turn that has ended is stored."""
    assert turn.stored is not None
    return turn.stored


def finish_survey(engine: Engine) -> None:
    """Lets the store find out whose the pages are that it found at its start."""
    assert engine.store.survey is not None
    engine.store.survey.finish()


def random_tokens(rng: np.random.Generator, count: int) -> list[int]:
    return rng.integers(1, 256, count).tolist()


def assert_nothing_leaked(engine: Engine) -> None:
    """All slots are free or hold a page that no turn holds; budgets are kept."""
    store = engine.store
    assert engine.scheduler.is_idle
    resident = list(store.index.in_tier(Tier.DEVICE))
    assert len(resident) + store.pool.num_free == store.pool.num_slots
    assert len({e.slot for e in resident}) == len(resident)
    assert not any(e.holds for tier in Tier for e in store.index.in_tier(tier))
    assert_budgets_kept(engine)


def assert_budgets_kept(engine: Engine) -> None:
    store = engine.store
    assert 0 <= store.host.used_bytes <= store.host.capacity_bytes
    rows = sum(1 for _ in store.index.in_tier(Tier.HOST))
    assert rows * store.layout.page_bytes <= store.host.used_bytes
    if store.disk is not None:
        assert 0 <= store.disk.used_bytes <= store.disk.capacity_bytes
