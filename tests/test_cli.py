"""The command: exit codes, what it prints and what it leaves behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cachedattn_jax.cli import app


def run(*arguments: str):
    return CliRunner().invoke(app, ["run", *arguments])


def test_a_run_leaves_its_directory_and_ends_with_its_claims(toy):
    result = run(toy("toy.run.seed = 2"), "--output_dir", "runs/one")
    assert result.exit_code == 0, result.output
    found = Path("runs/one")
    assert {path.name for path in found.iterdir()} == {
        "config.gin",
        "operative.gin",
        "environment.json",
        "turns.jsonl",
        "summary.json",
    }
    summary = json.loads((found / "summary.json").read_text())
    assert summary["number"] == 32
    assert summary["claims"][0]["holds"] is True
    environment = json.loads((found / "environment.json").read_text())
    assert environment["seed"] == 2
    assert environment["device"] and environment["versions"]["jax"]
    told, claims = result.output.split("Claims")
    assert told.endswith("Everything is in runs/one/.\n")
    assert "holds" in claims


def test_operative_gin_repeats_the_run(toy):
    run(toy("toy.run.seed = 5"), "--output_dir", "runs/first")
    result = run("runs/first/operative.gin", "--output_dir", "runs/second")
    assert result.exit_code == 0, result.output
    for name in ("summary.json", "turns.jsonl", "operative.gin"):
        texts = [Path("runs", which, name).read_text() for which in ("first", "second")]
        assert texts[0] == texts[1]


def test_files_and_bindings_can_be_options_and_the_name_makes_the_directory(toy):
    result = run("--gin_file", toy(), "--gin_bindings", "toy.run.seed = 1")
    assert result.exit_code == 0, result.output
    assert json.loads(Path("runs/toy/summary.json").read_text())["number"] == 31


def test_a_missed_target_is_printed_and_exits_zero(toy):
    result = run(toy("toy.SizeConfig.size = 2"), "--output_dir", "runs/missed")
    assert result.exit_code == 0
    assert "missed" in result.output


@pytest.mark.parametrize(
    ("fails", "code", "expected"),
    [
        ("invariant", 1, "cachedattn: broken invariant: token 3 differs"),
        ("mistake", 2, "cachedattn: error: the window is too short"),
    ],
)
def test_a_failed_run_says_so_in_one_line_and_has_no_summary(
    toy, fails, code, expected
):
    run(toy(), "--output_dir", "runs/failed")
    result = run(toy(f"toy.run.fails = '{fails}'"), "--output_dir", "runs/failed")
    assert result.exit_code == code
    assert result.stderr == expected + "\n"
    assert not Path("runs/failed/summary.json").exists()
    assert f"'{fails}'" in Path("runs/failed/operative.gin").read_text()


def test_a_bug_keeps_its_traceback(toy):
    result = run(toy("toy.run.fails = 'bug'"), "--output_dir", "runs/bug")
    assert isinstance(result.exception, RuntimeError)
    assert result.exit_code == 1


@pytest.mark.parametrize("line", ["toy.run.sed = 1", "toy.SizeConfig.size = 0"])
def test_a_mistake_exits_two_and_leaves_an_earlier_run_as_it_was(toy, line):
    run(toy(), "--output_dir", "runs/kept")
    before = {path: path.read_bytes() for path in Path("runs/kept").iterdir()}
    result = run(toy(line), "--output_dir", "runs/kept")
    assert result.exit_code == 2
    assert result.stderr.startswith("cachedattn: error: ")
    assert len(result.stderr.splitlines()) == 1
    assert {path: path.read_bytes() for path in Path("runs/kept").iterdir()} == before


def test_a_folder_of_something_else_is_refused(toy, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    result = run(toy(), "--output_dir", str(tmp_path))
    assert result.exit_code == 2
    assert "holds files that no run wrote, such as 'thesis.txt'" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_run_without_a_file_says_which_to_try():
    result = run()
    assert result.exit_code == 2
    assert "try configs/quickstart.gin" in result.stderr


def test_help_teaches_with_an_example():
    result = CliRunner().invoke(app, ["run", "--help"])
    assert "cachedattn run configs/quickstart.gin" in result.output
    for option in ("--gin_file", "--gin_bindings", "--output_dir"):
        assert option in result.output


def test_info_shows_versions_devices_and_presets():
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 0, result.output
    for text in ("jax ", "Python ", "pinned_host", "llama-3-70b"):
        assert text in result.output


def test_compiled_programs_are_kept_in_the_users_cache(tmp_path):
    """In a process of its own: jax reads the setting when it is imported."""
    (tmp_path / "compiles.py").write_text(
        "import jax\n"
        "def run(run_directory):\n"
        "    jax.jit(lambda x: x * 2 + 1)(jax.numpy.ones(8))\n"
        "    return {'claims': []}\n"
    )
    (tmp_path / "compiles.gin").write_text(
        "from __gin__ import dynamic_registration\nfrom cachedattn_jax import config\n"
        "import compiles\nconfig.Experiment.run = @compiles.run\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    subprocess.run(
        [sys.executable, "-m", "cachedattn_jax", "run", "compiles.gin"],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
    )
    assert list((tmp_path / "cache" / "cachedattn_jax" / "xla").iterdir())
