"""Checkpoints: what is saved comes back, and what does not fit is refused."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from cachedattn_jax.model.checkpoint import (
    load_checkpoint,
    load_hugging_face,
    save_checkpoint,
)
from cachedattn_jax.model.config import RopeScaling, preset
from cachedattn_jax.model.llama import init_params

GOLDEN = Path(__file__).parent / "golden" / "hugging_face"

SCALED = RopeScaling(kind="llama3", factor=8.0, original_window=128)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_embeddings": True, "dtype": "bfloat16"},
        {"rope_scaling": SCALED},
    ],
)
def test_saved_checkpoint_comes_back_bit_for_bit(tmp_path, fields):
    config = preset("tiny", num_layers=2, **fields)
    params = init_params(config, seed=3)
    save_checkpoint(tmp_path / "new" / "folder", config, params)
    loaded_config, loaded = load_checkpoint(str(tmp_path / "new" / "folder"))
    assert loaded_config == config
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert {x.dtype.name for x in jax.tree.leaves(loaded)} == {config.dtype}


@pytest.fixture
def saved(tmp_path):
    config = preset("tiny", num_layers=1)
    save_checkpoint(tmp_path / "saved", config, init_params(config, seed=0))
    return tmp_path / "saved"


def test_checkpoint_is_never_overwritten(saved):
    config = preset("tiny", num_layers=1)
    with pytest.raises(ValueError, match="saved is not empty"):
        save_checkpoint(saved, config, init_params(config, seed=1))
    load_checkpoint(saved)


def test_unfinished_checkpoint_is_not_read(saved):
    (saved / "model.json").unlink()
    with pytest.raises(ValueError, match="does not hold a checkpoint: no model.json"):
        load_checkpoint(saved)


def test_changed_weights_are_refused(saved, tmp_path):
    config = preset("tiny", num_layers=1)
    save_checkpoint(tmp_path / "other", config, init_params(config, seed=1))
    shutil.rmtree(saved / "weights")
    shutil.copytree(tmp_path / "other" / "weights", saved / "weights")
    with pytest.raises(ValueError, match="weights in .*saved are damaged"):
        load_checkpoint(saved)


@pytest.mark.parametrize("version", [1, 99])
def test_checkpoint_of_another_format_is_refused(saved, version):
    edit_json(saved / "model.json", format_version=version)
    message = (
        f"saved has checkpoint format {version}; this version reads 2: write it anew"
    )
    with pytest.raises(ValueError, match=message):
        load_checkpoint(saved)


def edit_json(path, **entries):
    """Replaces entries of a JSON file; None removes one."""
    merged = {**json.loads(path.read_text()), **entries}
    kept = {name: value for name, value in merged.items() if value is not None}
    path.write_text(json.dumps(kept))


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(GOLDEN / "llama3", tmp_path / "folder")
    return tmp_path / "folder"


def test_hugging_face_config_is_mapped():
    config, params = load_hugging_face(GOLDEN / "llama3")
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (
        64,
        32,
        48,
    )
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (2, 4, 2)
    assert (config.head_dim, config.window, config.rope_theta) == (8, 128, 100.0)
    assert config.rope_scaling == RopeScaling(
        kind="llama3", factor=8.0, original_window=32
    )
    assert (config.dtype, config.tie_embeddings) == ("bfloat16", False)
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"bfloat16"}


def test_tied_hugging_face_folder_has_no_output_projection():
    config, params = load_hugging_face(GOLDEN / "linear")
    assert config.tie_embeddings
    assert params.lm_head is None
    assert config.rope_scaling == RopeScaling(kind="linear", factor=4.0)


def test_older_spelling_of_rope_and_dtype_is_read(folder):
    edit_json(
        folder / "config.json",
        rope_parameters=None,
        dtype=None,
        torch_dtype="bfloat16",
        rope_theta=500000,
        rope_scaling={"type": "linear", "factor": 2},
    )
    config, _ = load_hugging_face(folder)
    assert config.rope_theta == 500000.0
    assert config.rope_scaling == RopeScaling(kind="linear", factor=2.0)
    assert config.dtype == "bfloat16"


@pytest.mark.parametrize(("sliding_window", "window"), [(48, 48), (4096, 128)])
def test_window_of_a_mistral_ends_at_its_sliding_window(folder, sliding_window, window):
    edit_json(
        folder / "config.json", model_type="mistral", sliding_window=sliding_window
    )
    config, _ = load_hugging_face(folder)
    assert config.window == window


YARN = {"rope_type": "yarn", "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
SHORT_LLAMA3 = {"rope_type": "llama3", "factor": 4.0}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"rope_parameters": YARN}, "'yarn' is not supported"),
        ({"rope_parameters": DYNAMIC}, "'dynamic' is not supported"),
        ({"rope_parameters": SHORT_LLAMA3}, "'llama3' .* has no 'low_freq_factor'"),
        ({"model_type": "qwen3"}, "model_type='qwen3'; supported: 'llama', 'mistral'"),
        ({"attention_bias": True}, "attention_bias=True; supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'; supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"dtype": "float16"}, "dtype='float16'.*choose dtype='float32'"),
        ({"rms_norm_eps": None}, "config.json has no 'rms_norm_eps'"),
        ({"num_hidden_layers": 3}, "has no tensor 'model.layers.2."),
        ({"intermediate_size": 64}, r"has shape \(48, 32\); .* implies \(64, 32\)"),
        (
            {"num_key_value_heads": 1},
            r"k_proj.* shape \(16, 32\); .* implies \(8, 32\)",
        ),
        ({"head_dim": 4}, r"q_proj.* shape \(32, 32\); .* implies \(16, 32\)"),
    ],
)
def test_hugging_face_folders_that_do_not_fit_are_refused(folder, entries, message):
    edit_json(folder / "config.json", **entries)
    with pytest.raises(ValueError, match=message):
        load_hugging_face(folder)


def test_half_precision_weights_are_read_into_the_dtype_asked_for(folder):
    edit_json(folder / "config.json", dtype="float16")
    config, params = load_hugging_face(folder, dtype="float32")
    assert config.dtype == "float32"
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}


def test_folder_without_weights_or_config_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no \*.safetensors file"):
        load_hugging_face(folder)
    with pytest.raises(ValueError, match="does not hold a Hugging Face model"):
        load_hugging_face(folder / "absent")


def test_truncated_weights_are_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated"):
        load_hugging_face(folder)
