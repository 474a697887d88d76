"""The command: exit codes, run directory, and mistakes without a traceback."""

import json

import pytest
from typer.testing import CliRunner

from cachedattn_jax.cli import app
from tests.test_config import HEADER

runner = CliRunner()


@pytest.fixture
def toy(tmp_path):
    path = tmp_path / "toy.gin"
    path.write_text(HEADER)
    return str(path)


def invoke(*args: str):
    result = runner.invoke(app, list(args))
    assert "Traceback" not in result.output
    return result


def test_a_run_writes_its_directory_and_prints_its_claims(toy, tmp_path):
    out = tmp_path / "out"
    result = invoke(
        "run", toy, "--gin_bindings", "toy_experiment.run.factor = 4",
        "--output_dir", str(out),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "factor" in result.output and "holds" in result.output
    summary = json.loads((out / "summary.json").read_text())
    (claim,) = summary["claims"]
    assert claim == {
        "name": "factor",
        "value": 4,
        "target": 3,
        "comparison": ">=",
        "unit": "x",
        "holds": True,
        "kind": "measured",
    }
    assert json.loads((out / "turns.jsonl").read_text()) == {"turn": 0, "factor": 4}
    assert "factor = 4" in (out / "config.gin").read_text()
    assert "factor = 4" in (out / "operative.gin").read_text()
    environment = json.loads((out / "environment.json").read_text())
    assert environment["versions"]["jax"] and environment["device"]


def test_a_missed_target_is_printed_and_is_no_failure(toy, tmp_path):
    result = invoke("run", toy, "--output_dir", str(tmp_path / "out"))
    assert result.exit_code == 0
    assert "missed" in result.output


def test_a_broken_invariant_exits_with_1(toy, tmp_path):
    result = invoke(
        "run", "--gin_file", toy, "--gin_bindings", "toy_experiment.run.breaks = True",
        "--output_dir", str(tmp_path / "out"),
    )  # fmt: skip
    assert result.exit_code == 1
    assert "broken invariant: token 3 differs" in result.output


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["run"], "no gin file is named"),
        (["run", "nowhere.gin"], "there is no file 'nowhere.gin'"),
        (
            ["run", "TOY", "--gin_bindings", "toy_experiment.run.factr=1"],
            "mean 'factor'",
        ),
        (["run", "TOY", "--output_dir", "FOREIGN"], "not of a run"),
        (["run", "TOY", "--output_dir", "/proc/nowhere"], "cannot be used"),
    ],
)
def test_mistakes_exit_with_2_and_one_sentence(toy, tmp_path, args, sentence):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    names = {"TOY": toy, "FOREIGN": str(foreign)}
    result = invoke(*[names.get(arg, arg) for arg in args])
    assert result.exit_code == 2
    assert sentence in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert (foreign / "thesis.tex").read_text() == "years of work"


def test_an_earlier_run_is_replaced_whole(toy, tmp_path):
    out = str(tmp_path / "out")
    for _ in range(2):
        assert invoke("run", toy, "--output_dir", out).exit_code == 0
    assert len((tmp_path / "out" / "turns.jsonl").read_text().splitlines()) == 1


def test_help_teaches_with_an_example():
    result = invoke("run", "--help")
    assert result.exit_code == 0
    assert "quickstart.gin" in result.output


def test_info_lists_devices_and_presets():
    result = invoke("info")
    assert result.exit_code == 0
    assert "llama-3-70b" in result.output and "pinned_host" in result.output
