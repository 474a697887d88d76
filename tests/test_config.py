"""Gin files: mistakes fail before anything runs, in one sentence."""

import pytest

from cachedattn_jax import config
from cachedattn_jax.run_directory import RunDirectory

HEADER = """
from __gin__ import dynamic_registration
from cachedattn_jax import config
from cachedattn_jax.store import budget
from experiments import sampled_lengths
from tests import toy_experiment
config.Experiment.run = @toy_experiment.run
"""


def load(tmp_path, text: str = "", bindings: tuple[str, ...] = ()):
    path = tmp_path / "toy.gin"
    path.write_text(HEADER + text)
    return config.load([str(path)], list(bindings))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("toy_experiment.run.factr = 2", r"'factr'.*line \d+.*did you mean 'factor'"),
        ("toy_experiment.rum.factor = 2", r"'rum' does not exist.*mean 'run'"),
        ("toy_experimnt.run.factor = 2", r"toy_experimnt.*mean 'toy_experiment'"),
        ("from experiments import sharegtp", r"sharegtp.*did you mean 'sharegpt'"),
        ("toy_experiment.run.factor = %FACTOR", r"macro 'FACTOR' is used but not set"),
        ("toy_experiment.run.factor = two", r"malformed|two"),
        ("include 'nowhere.gin'", r"nowhere.gin"),
        ("config.Experiment.run = 3", r"run=3 must be a reference"),
    ],
)
def test_a_typo_fails_with_one_sentence_that_names_the_nearest(
    tmp_path, line, sentence
):
    with pytest.raises(ValueError, match=sentence) as caught:
        load(tmp_path, line)
    assert "\n" not in str(caught.value)


def test_a_value_out_of_range_is_named(tmp_path):
    experiment = load(
        tmp_path,
        "toy_experiment.run.store = @budget.StoreConfig()\n"
        "budget.StoreConfig.host_bytes = -1",
    )
    with pytest.raises(ValueError, match="host_bytes=-1 must be"):
        experiment.run(RunDirectory(tmp_path / "run"))


def test_bindings_win_over_files(tmp_path):
    experiment = load(
        tmp_path, "toy_experiment.run.factor = 2", ("toy_experiment.run.factor = 5",)
    )
    summary = experiment.run(RunDirectory(tmp_path / "run"))
    assert summary["factor"] == 5


def test_the_operative_config_repeats_the_run(tmp_path):
    experiment = load(tmp_path, "toy_experiment.run.factor = 7")
    first = experiment.run(RunDirectory(tmp_path / "first"))
    again = tmp_path / "operative.gin"
    again.write_text(config.operative_text())
    repeated = config.load([str(again)], [])
    assert repeated.run(RunDirectory(tmp_path / "second")) == first


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="there is no file 'nowhere.gin'"):
        config.load(["nowhere.gin"], [])
