"""The sizes of an engine: what is given stays, what is "auto" suits the platform."""

from typing import Any

import pytest

from cachedattn_jax.engine.engine_config import EngineConfig, Sizes


def test_sizes_that_are_given_stay_on_every_platform():
    given = EngineConfig(page_tokens=32, layers_per_group=3, chunk_tokens=(8, 100))
    for platform in ("cpu", "gpu", "tpu"):
        sizes = given.sizes(platform, 12)
        calls = sizes.call_tokens
        assert sizes == Sizes(
            page_tokens=32,
            layers_per_group=3,
            chunk_tokens=(8, 100),
            call_tokens=calls,
        )
        assert (calls > 100) == (platform != "cpu")


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("num_layers", [1, 6, 7, 32, 40, 80])
def test_automatic_groups_divide_every_model(platform, num_layers):
    sizes = EngineConfig().sizes(platform, num_layers)
    assert num_layers % sizes.layers_per_group == 0
    assert sizes.layers_per_group <= 8
    assert sizes.page_tokens == (16 if platform == "cpu" else 64)


def test_one_automatic_size_leaves_the_others():
    sizes = EngineConfig(page_tokens=16).sizes("gpu", 32)
    assert (sizes.page_tokens, sizes.layers_per_group) == (16, 8)


@pytest.mark.parametrize("name", ["page_tokens", "layers_per_group", "chunk_tokens"])
def test_no_other_word_is_taken_for_a_size(name):
    with pytest.raises(ValueError, match=f"{name}="):
        wrong: dict[str, Any] = {name: "large"}
        EngineConfig(**wrong)
