"""The experiments on truncation: scores equal dense attention, small runs end well."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from cachedattn_jax.engine.engine_config import EngineConfig
from cachedattn_jax.engine.truncation import TruncationConfig
from cachedattn_jax.run_directory import RunDirectory
from cachedattn_jax.store.budget import StoreConfig
from experiments import truncation_cost, truncation_quality
from experiments.byte_model import TrainingConfig
from experiments.training_text import (
    LINE_BYTES,
    make_lines,
    read_corpus,
    retrieval_sample,
)
from experiments.truncated_scores import Scorer
from experiments.workload import Conversation, Turn, Workload
from tests.engines import random_tokens, tiny_model
from tests.truncated_dense import DenseCache

WINDOW = tiny_model()[0].window


@pytest.fixture(scope="module")
def scorer():
    scorer = Scorer(*tiny_model(), page_tokens=16)
    yield scorer
    scorer.close()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("policy", "keep"), [("truncate_pages", 0), ("truncate_pages", 1), ("naive", 0)]
)
def test_logits_equal_dense_attention_over_the_same_keys(scorer, policy, keep, seed):
    tokens = random_tokens(np.random.default_rng(seed), 3 * WINDOW - 5)
    config = TruncationConfig(policy=policy, keep_first_pages=keep)
    found = scorer.logits(np.asarray(tokens), config)
    cache, start = DenseCache(is_naive=policy == "naive"), 16 * keep
    for token, logits in zip(tokens, found, strict=True):
        if cache.length == WINDOW:
            cache.drop(np.arange(start, start + WINDOW // 2))
        np.testing.assert_allclose(logits, cache.feed(token), atol=1e-4)


def test_recomputing_gives_the_logits_of_what_is_left_alone(scorer):
    tokens = random_tokens(np.random.default_rng(0), WINDOW + 20)
    config = TruncationConfig(policy="truncate_tokens_recompute")
    found = scorer.logits(np.asarray(tokens), config)
    cache = DenseCache()
    fresh = [cache.feed(token) for token in tokens[WINDOW // 2 :]]
    np.testing.assert_allclose(found[WINDOW:], fresh[-20:], atol=1e-4)


def test_lines_are_asked_for_with_what_was_there_before():
    rng = np.random.default_rng(0)
    text = read_corpus().held_out
    for _ in range(20):
        sample, is_repeated = retrieval_sample(rng, text, 300)
        assert len(sample) == len(is_repeated) == 300
        assert 0 < is_repeated.sum() < 300
    names = make_lines(rng, 26)[:, 0].tolist()
    assert len(set(names)) == 26
    question = truncation_quality._question(rng, text, 256, 8)
    line = question[-(LINE_BYTES - 1) :]
    kept = question[128 : -(LINE_BYTES - 1)].tobytes()
    assert len(question) > 256 and bytes(line) in kept


def test_the_model_is_trained_once_and_every_policy_is_scored(tmp_path):
    training = TrainingConfig(
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=2,
        window=64,
        batch_size=4,
        num_steps=3,
    )
    options: dict[str, Any] = {
        "training": training,
        "checkpoints": str(tmp_path / "kept"),
        "num_texts": 1,
        "windows_per_text": 2,
        "num_questions": 2,
        "num_lines": 3,
    }
    runs = [RunDirectory(tmp_path / name) for name in "abc"]
    first: dict[str, Any] = truncation_quality.run(runs[0], **options)
    (kept,) = (tmp_path / "kept").iterdir()
    changed = kept.stat().st_mtime_ns
    second: dict[str, Any] = truncation_quality.run(runs[1], **options)
    assert kept.stat().st_mtime_ns == changed
    assert first["perplexity"] == second["perplexity"]
    assert first["retrieval"].keys() == {"ours", "TT", "NKVT", "sinks"}
    with pytest.raises(ValueError, match="text_file='nowhere' cannot be read"):
        truncation_quality.run(runs[2], text_file="nowhere", **options)
    with pytest.raises(ValueError, match="retrieval_share=2 must lie"):
        dataclasses.replace(training, retrieval_share=2)


def test_the_cost_of_every_policy_is_counted(tmp_path):
    turns = tuple(Turn(new_tokens=20, output_tokens=15) for _ in range(6))
    workload = Workload(
        name="long",
        conversations=tuple(
            Conversation(session_id=name, arrival_s=0.0, turns=turns) for name in "ab"
        ),
    )
    summary: dict[str, Any] = truncation_cost.run(
        RunDirectory(tmp_path / "run"),
        workload=workload,
        window=96,
        engine=EngineConfig(page_tokens=16, max_batch=2, chunk_tokens=(32,)),
        store=StoreConfig(device_bytes="4 MiB", host_bytes="8 MiB"),
        long_reply=40,
    )
    modes = summary["modes"]
    assert modes["no overflow"]["truncations"] == 0
    assert modes["ours"]["truncations"] == modes["OF"]["truncations"] > 0
    assert modes["ours"]["recomputed_tokens"] == 0
    assert modes["TT"]["recomputed_tokens"] > 0
    assert modes["OF"]["hit_rate"] < modes["ours"]["hit_rate"] == 1.0
    assert summary["sessions_past_the_window"] == 1.0
