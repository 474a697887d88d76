"""The experiments on truncation: scores equal dense attention, small runs end well."""

import dataclasses
import shutil
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from cachedattn_jax.engine.engine_config import EngineConfig
from cachedattn_jax.engine.truncation import TruncationConfig
from cachedattn_jax.model.llama import apply_layer, embed
from cachedattn_jax.run_directory import RunDirectory
from cachedattn_jax.store.budget import StoreConfig
from experiments import truncation_cost, truncation_quality
from experiments.byte_model import TrainingConfig
from experiments.initial_params import initial_params
from experiments.token_texts import Bytes, Subwords, make_question
from experiments.training_text import make_lines, read_corpus, retrieval_sample
from experiments.truncated_scores import Scorer
from experiments.workload import Conversation, Turn, Workload
from tests.engines import random_tokens, tiny_model
from tests.test_checkpoint import GOLDEN
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
        sample, is_answer = retrieval_sample(rng, text, 300)
        assert len(sample) == len(is_answer) == 300
        for place in np.flatnonzero(is_answer):
            before = sample[: place - 1].tobytes()
            assert sample[place - 1 : place + 1].tobytes() in before
    names = make_lines(rng, 26)[:, 0].tolist()
    assert len(set(names)) == 26


def tokenizer_file(folder):
    """Of 64 tokens that may stand for more than a character."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="?"))
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=64, special_tokens=["?"])
    text = "line 0123456789: REGISTER_CONTENT is <0123456789>\nline line 11 22"
    made.train_from_iterator([text] * 9, trainer)
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.fixture(params=["bytes", "subwords"])
def encoding(request, tmp_path):
    if request.param == "bytes":
        return Bytes()
    return Subwords(tokenizer_file(tmp_path))


def test_the_line_asked_for_survives_the_truncation(encoding):
    rng = np.random.default_rng(0)
    text = encoding.encode(read_corpus().held_out.tobytes().decode())
    for _ in range(20):
        question = make_question(rng, encoding, text, 256, 3)
        ids = question.token_ids.tolist()
        assert len(ids) > 256, "the window does not overflow"
        # What is asked for, with what is before it on its line, is in the kept half.
        asked = ids[-question.num_answer - 1 :]
        kept = ids[128 : -question.num_answer]
        places = range(len(kept) - len(asked) + 1)
        assert any(kept[i : i + len(asked)] == asked for i in places)
    with pytest.raises(ValueError, match="num_lines=60 are .* tokens; a window of 256"):
        make_question(rng, encoding, text, 256, 60)


def test_the_value_of_a_line_is_told_from_the_rest(tmp_path):
    encoding = Subwords(tokenizer_file(tmp_path))
    for line in encoding.lines(np.random.default_rng(1), 20):
        start, stop = line.value
        decode = encoding._tokenizer.decode
        assert decode(line.token_ids[:start].tolist()).endswith("<")
        assert decode(line.token_ids[start:stop].tolist()).replace(" ", "").isdigit()


def small_options(folder) -> dict[str, Any]:
    return {
        "training": TrainingConfig(
            hidden_size=32,
            intermediate_size=48,
            num_layers=2,
            num_heads=2,
            window=64,
            batch_size=4,
            num_steps=3,
        ),
        "checkpoints": str(folder / "kept"),
        "num_texts": 1,
        "windows_per_text": 2,
        "num_questions": 2,
        "num_lines": 3,
    }


def test_the_model_is_trained_once_and_every_policy_is_scored(tmp_path):
    options = small_options(tmp_path)
    runs = [RunDirectory(tmp_path / name) for name in "abc"]
    first: dict[str, Any] = truncation_quality.run(runs[0], **options)
    (kept,) = (tmp_path / "kept").iterdir()
    changed = kept.stat().st_mtime_ns
    second: dict[str, Any] = truncation_quality.run(runs[1], **options)
    assert kept.stat().st_mtime_ns == changed
    assert first["perplexity"] == second["perplexity"]
    of_byte, of_four = (first["perplexity"][unit] for unit in ("byte", "4 bytes"))
    (text,) = of_byte
    assert of_four[text]["TT"] == pytest.approx(of_byte[text]["TT"] ** 4)
    assert first["retrieval"].keys() == {"ours", "TT", "NKVT", "sinks"}
    with pytest.raises(ValueError, match="text_file='nowhere' cannot be read"):
        truncation_quality.run(runs[2], text_file="nowhere", **options)
    with pytest.raises(ValueError, match="lines_share=2 must lie"):
        dataclasses.replace(options["training"], lines_share=2)


def test_a_hugging_face_checkpoint_is_scored_with_its_tokenizer(tmp_path):
    checkpoint = tmp_path / "model"
    shutil.copytree(GOLDEN / "llama3", checkpoint)
    options: dict[str, Any] = small_options(tmp_path)
    options["checkpoint"] = str(checkpoint)
    run_directory = RunDirectory(tmp_path / "run")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        truncation_quality.run(run_directory, **options)
    tokenizer_file(checkpoint)
    with pytest.raises(ValueError, match="num_lines=3 are"):
        truncation_quality.run(run_directory, **options)
    options |= {"num_lines": 1, "window": 999}
    with pytest.raises(ValueError, match="window=999 is more than the 128"):
        truncation_quality.run(run_directory, **options)
    options |= {"window": None}
    summary: dict[str, Any] = truncation_quality.run(run_directory, **options)
    assert summary["window"] == 128 and summary["perplexity"].keys() == {"token"}
    assert not (tmp_path / "kept").exists()


def test_heads_that_find_lines_are_in_place_before_the_training():
    """The first looks one byte back, the second at what came after the name before."""
    model = TrainingConfig().model
    params = initial_params(model, 0)
    rng = np.random.default_rng(0)
    tokens, answers = retrieval_sample(rng, read_corpus().training, model.window)
    back, find = weights_of_head_0(model, params, tokens.astype(np.int32))
    assert np.median(np.diagonal(back, -1)) > 0.9
    is_found = []
    for place in np.flatnonzero(answers):
        name = tokens[place - 1]
        same = np.flatnonzero(tokens[: place - 1] == name) + 1
        is_found.append(find[place - 1].argmax() in same)
    assert np.mean(is_found) > 0.8


def weights_of_head_0(model, params, tokens) -> list[np.ndarray]:
    """Of two layers, float64 [queries, keys], with absolute positions."""
    found = []

    def attend(query, key, value):
        size = model.head_dim
        turn = np.arange(len(tokens))[:, None] * model.inverse_frequencies()
        turn = np.exp(1j * turn)
        q, k = (
            (np.asarray(x)[:, 0, : size // 2] + 1j * np.asarray(x)[:, 0, size // 2 :])
            * turn
            for x in (query, key)
        )
        scores = np.real(q @ np.conj(k).T) / size**0.5
        scores = np.where(np.tril(np.ones_like(scores)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        found.append(weights / weights.sum(-1, keepdims=True))
        heads = found[-1] @ np.asarray(value)[:, 0]
        rest = np.zeros_like(np.asarray(value)[:, 1:])
        output = np.concatenate([heads[:, None].astype(np.float32), rest], axis=1)
        return jnp.asarray(output, jnp.float32)

    x = embed(model, params, jnp.asarray(tokens))
    for layer in params.layers[:2]:
        x = apply_layer(model, layer, x, attend)
    return found


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
        rounds=2,
        long_reply=60,
        long_replies=2,
    )
    modes = summary["modes"]
    assert modes["no overflow"]["truncations"] == 0
    assert modes["ours"]["truncations"] == modes["OF"]["truncations"] > 0
    assert modes["ours"]["recomputed_tokens"] == 0
    assert modes["TT"]["recomputed_tokens"] > 0
    assert modes["OF"]["hit_rate"] < modes["ours"]["hit_rate"] == 1.0
    assert summary["sessions_past_the_window"] == 1.0
    most = summary["long_reply"]["medians"]["max_s"]
    assert most.keys() == {"decoding", "saving", "truncating"}
