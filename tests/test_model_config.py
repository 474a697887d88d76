"""Configurations: published shapes, rotary frequencies, and what is refused."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from cachedattn_jax.model.config import PRESETS, RopeScaling, preset

TINY = PRESETS["tiny"]


# Parameters of the published checkpoints, as their safetensors files hold them.
@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("mistral-7b", 7_241_732_096),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, num_parameters):
    assert PRESETS[name].num_parameters == num_parameters


@pytest.mark.parametrize(
    ("name", "window", "theta"),
    [
        ("llama-2-7b", 4096, 1e4),
        ("llama-2-13b", 4096, 1e4),
        ("llama-2-70b", 4096, 1e4),
        ("llama-3-8b", 8192, 5e5),
        ("llama-3-70b", 8192, 5e5),
        ("mistral-7b", 32768, 1e6),
    ],
)
def test_presets_have_the_published_window_rotation_and_numerics(name, window, theta):
    config = PRESETS[name]
    assert (config.window, config.rope_theta) == (window, theta)
    assert config.rope_scaling is None
    assert config.norm_eps == 1e-5
    assert config.dtype == "bfloat16"
    assert config.head_dim * config.num_heads == config.hidden_size


def test_small_preset_has_between_20_and_40_million_parameters():
    assert 20e6 < PRESETS["small"].num_parameters < 40e6


def test_presets_take_overrides_and_stay_as_they_were():
    assert preset("tiny", window=512).window == 512
    assert preset("tiny") == TINY
    assert TINY.window == 256


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="'lama-3-8b'; did you mean 'llama-3-8b'"):
        preset("lama-3-8b")


def test_unknown_preset_far_from_all_lists_them():
    with pytest.raises(ValueError, match="'qqq'; known: tiny, small, llama-2-7b"):
        preset("qqq")


def test_unknown_override_names_the_nearest_field():
    with pytest.raises(ValueError, match="no 'num_layer'; did you mean 'num_layers'"):
        preset("tiny", num_layer=2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"head_dim": 15}, "head_dim=15 must be even"),
        ({"num_layers": 0}, "num_layers=0 must be a whole number of at least 1"),
        ({"window": -1}, "window=-1 must be a whole number"),
        ({"hidden_size": 64.0}, "hidden_size=64.0 must be a whole number"),
        ({"vocab_size": True}, "vocab_size=True must be a whole number"),
        ({"rope_theta": 0.5}, "rope_theta=0.5 must be above 1"),
        ({"rope_theta": "1e4"}, "rope_theta='1e4' must be a finite number"),
        ({"norm_eps": 0.0}, "norm_eps=0.0 must lie between 0 and 1"),
        ({"norm_eps": float("nan")}, "norm_eps=nan must be a finite number"),
        ({"dtype": "float16"}, "dtype='float16' is not one of float32, bfloat16"),
        ({"tie_embeddings": 1}, "tie_embeddings=1 must be True or False"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear' must be a RopeScaling"),
    ],
)
def test_impossible_configs_are_refused_with_value_and_limit(override, message):
    with pytest.raises(ValueError, match=message):
        preset("tiny", **override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"kind": "dynamic"}, "'dynamic' is not supported.*change with the sequence"),
        ({"kind": "yarn"}, "'yarn' is not supported.*attention factor"),
        ({"kind": "longrope"}, "'longrope' is not one of 'linear', 'llama3'"),
        ({"factor": 0.5}, "factor=0.5 must be at least 1"),
        ({"factor": "8"}, "factor='8' must be a finite number"),
        ({"low_freq_factor": 4.0}, "low_freq_factor=4.0 must be positive and below"),
        ({"original_window": 0}, "original_window=0 must be a whole number"),
    ],
)
def test_impossible_rope_scalings_are_refused_with_the_reason(override, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**{"kind": "llama3", "factor": 8.0} | override)


def test_configs_are_frozen_and_equal_ones_hash_alike():
    scaled = {"rope_scaling": RopeScaling(kind="linear", factor=2)}
    assert hash(preset("tiny", **scaled)) == hash(preset("tiny", **scaled))
    assert preset("tiny", **scaled) != TINY
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.__setattr__("window", 1)


def test_whole_numbers_and_floats_describe_the_same_rotation():
    """A store's layout digest is made of this text."""
    whole = preset("tiny", rope_theta=10000)
    assert repr(whole) == repr(TINY)
    assert repr(RopeScaling(kind="linear", factor=2)) == repr(
        RopeScaling(kind="linear", factor=2.0)
    )


def test_default_frequencies_fall_from_one_towards_one_over_theta():
    frequencies = preset("tiny", head_dim=4).inverse_frequencies()
    assert frequencies.dtype == np.float64
    np.testing.assert_allclose(frequencies, [1.0, 0.01], rtol=1e-15)


def test_linear_scaling_divides_every_frequency():
    scaled = preset("tiny", rope_scaling=RopeScaling(kind="linear", factor=4.0))
    np.testing.assert_allclose(
        scaled.inverse_frequencies() * 4.0, TINY.inverse_frequencies(), rtol=1e-15
    )


def test_llama3_scaling_keeps_fast_divides_slow_and_blends_between():
    config = preset(
        "tiny",
        head_dim=8,
        rope_theta=100.0,
        rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_window=32),
    )
    # Wavelengths 6.3, 19.9, 62.8, 198.7; fast is below 8 tokens, slow is above 32.
    plain = 100.0 ** -np.array([0.0, 0.25, 0.5, 0.75])
    turns = 32 * plain[1] / (2 * np.pi)
    kept = (turns - 1.0) / 3.0
    blended = (1.0 - kept) * plain[1] / 8.0 + kept * plain[1]
    expected = [plain[0], blended, plain[2] / 8.0, plain[3] / 8.0]
    np.testing.assert_allclose(config.inverse_frequencies(), expected, rtol=1e-14)


def test_number_of_parameters_counts_tied_embeddings_once():
    tied = preset("tiny", tie_embeddings=True)
    assert TINY.num_parameters - tied.num_parameters == 256 * 64


def test_config_imports_no_jax():
    code = "import sys, cachedattn_jax.model.config; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
