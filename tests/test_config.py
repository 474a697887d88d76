"""What a .gin file can say, and how its mistakes are told."""

from pathlib import Path

import pytest

from cachedattn_jax import config
from cachedattn_jax.run_directory import RunDirectory
from tests.conftest import TOY_GIN

CHECKOUT = Path(__file__).parent.parent
HEAD = "from __gin__ import dynamic_registration\n"
# The lines of TOY_GIN; what a test adds stands on the next one.
NEXT = f"(toy.gin, line {len(TOY_GIN.splitlines()) + 1})"

MISTAKES = [
    ("toy.run.sed = 1", "toy.run has no parameter 'sed'; did you mean 'seed'? " + NEXT),
    (
        "toy.SizeConfig.sise = 1",
        "toy.SizeConfig has no parameter 'sise'; did you mean 'size'? " + NEXT,
    ),
    (
        "toy.rum.seed = 1",
        "toy_experiments.toy has no 'rum'; did you mean 'run'? " + NEXT,
    ),
    (
        "toy.run.seed = @toy.rum",
        "toy_experiments.toy has no 'rum'; did you mean 'run'? " + NEXT,
    ),
    ("toi.run.seed = 1", "'toi' is not imported; did you mean 'toy'? " + NEXT),
    (
        "from toy_experiments import toi",
        "there is no module 'toy_experiments.toi'; did you mean 'toy'? " + NEXT,
    ),
    ("toy.run.seed = %SEED", "the macro %SEED is not set " + NEXT),
    ("SEED = 2", "nothing uses the macro 'SEED' " + NEXT),
    (
        "toy.run.seed = %gin.REQUIRED",
        "toy.run.seed must be set, for example by"
        f" --gin_bindings 'toy.run.seed = ...' {NEXT}",
    ),
    (
        "toy.run.seed = seven",
        f"seven is no value; text needs quotes, a macro %, a reference @ {NEXT}",
    ),
    ("toy.run.seed = (1,", "a bracket or a quote stays open (toy.gin)"),
    ("toy.run.seed = = 1", f"Unable to parse value: toy.run.seed = = 1 {NEXT}"),
    ("toy.seed = 1", f"'toy.seed = 1' should be module.name.parameter = value {NEXT}"),
    ("include 'toi.gin'", "no file 'toi.gin' to include; did you mean 'toy.gin'?"),
    ("config.Experiment.run = 3", "run=3 must be a reference such as @reuse.run"),
]


@pytest.mark.parametrize(("line", "expected"), MISTAKES)
def test_a_mistake_is_one_sentence_with_its_place_and_the_nearest_name(
    toy, line, expected
):
    with pytest.raises(ValueError) as error:
        config.load([toy(line)])
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("binding", "expected"),
    [
        ("toy.run.sed = 1", "did you mean 'seed'? (--gin_bindings 'toy.run.sed = 1')"),
        ("toy.run.seed 1", "(--gin_bindings 'toy.run.seed 1')"),
        ("SEDE = 1", "did you mean 'SEED'? (--gin_bindings 'SEDE = 1')"),
    ],
)
def test_a_mistake_in_a_binding_names_the_binding(toy, binding, expected):
    with pytest.raises(ValueError) as error:
        config.load([toy("SEED = 3", "toy.run.seed = %SEED")], [binding])
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("toy.SizeConfig.size = 0", f"SizeConfig: size=0 must be at least 1 {NEXT}"),
        ("toy.SizeConfig.size = 'a'", "SizeConfig does not take its values (toy.Size"),
    ],
)
def test_a_wrong_value_is_told_before_the_experiment_is_entered(
    toy, tmp_path, line, expected
):
    loaded = config.load([toy(line)])
    with pytest.raises(ValueError) as error:
        loaded.start(RunDirectory(tmp_path / "run"))
    assert expected in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_missing_value_is_told_by_name(toy, tmp_path):
    toy()
    Path("short.gin").write_text(TOY_GIN.replace("toy.run.sizes", "# "))
    with pytest.raises(ValueError, match="run needs a value for 'sizes'"):
        config.load(["short.gin"]).start(RunDirectory(tmp_path / "run"))


def test_an_error_of_the_experiment_itself_stays_what_it_is(toy, tmp_path):
    loaded = config.load([toy("toy.run.fails = 'bug'")])
    with pytest.raises(RuntimeError) as error:
        loaded.start(RunDirectory(tmp_path / "run"))
    assert str(error.value) == "unexpected"


def test_a_file_without_an_experiment_is_refused(toy):
    toy()
    Path("empty.gin").write_text(HEAD)
    with pytest.raises(ValueError, match="no experiment is named; a file binds config"):
        config.load(["empty.gin"])


def test_a_missing_file_names_its_nearest_neighbour(toy):
    toy()
    with pytest.raises(ValueError, match="no file 'tpy.gin'; did you mean 'toy.gin'"):
        config.load(["tpy.gin"])


def test_later_files_and_bindings_win(toy):
    first = toy("toy.run.seed = 1")
    Path("second.gin").write_text(
        HEAD + "from toy_experiments import toy\ntoy.run.seed = 2\n"
    )
    assert config.load([first]).seed == 1
    assert config.load([first, "second.gin"]).seed == 2
    assert config.load([first, "second.gin"], ["toy.run.seed = 3"]).seed == 3


def test_a_binding_may_use_a_name_that_a_file_only_imports(toy, tmp_path):
    # No other test names OtherConfig: gin remembers what any file has named.
    bindings = ["toy.OtherConfig.size = 7", "toy.run.sizes = @toy.OtherConfig()"]
    summary = config.load([toy()], bindings).start(RunDirectory(tmp_path))
    assert summary["number"] == 70


def test_the_seed_is_the_bound_one_or_the_default(toy):
    assert config.load([toy()]).seed == 0
    assert config.load([toy("SEED = 4", "toy.run.seed = %SEED")]).seed == 4


def test_operative_str_has_defaults_and_repeats_the_run(toy, tmp_path):
    loaded = config.load([toy("toy.run.seed = 5")])
    first = loaded.start(RunDirectory(tmp_path / "1"))
    text = config.operative_str()
    assert "toy.SizeConfig.size = 3" in text
    Path("again.gin").write_text(text)
    assert config.load(["again.gin"]).start(RunDirectory(tmp_path / "2")) == first
    assert config.operative_str() == text


@pytest.mark.parametrize("path", sorted(CHECKOUT.glob("configs/**/*.gin")), ids=str)
def test_every_config_of_the_checkout_loads(path, monkeypatch):
    monkeypatch.chdir(CHECKOUT)
    assert callable(config.load([str(path.relative_to(CHECKOUT))]).run)
