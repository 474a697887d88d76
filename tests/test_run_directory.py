"""What a run leaves behind, and what a claim is."""

import gzip
import io
import json
import math

import numpy as np
import pytest
from rich.console import Console

from cachedattn_jax.run_directory import (
    Claim,
    RunDirectory,
    claims_of,
    print_claims,
)


@pytest.mark.parametrize(
    ("value", "comparison", "target", "holds"),
    [
        (0.8, ">=", 0.8, True),
        (0.79, ">=", 0.8, False),
        (5, "<=", 5, True),
        (6, "<=", 5, False),
        (True, "==", True, True),
        (False, "==", True, False),
        (np.float32(0.9), ">=", 0.8, True),
        (np.bool_(True), "==", True, True),
        (None, ">=", 0.8, False),
        (math.nan, ">=", 0.8, False),
        (math.nan, "<=", 0.8, False),
    ],
)
def test_a_claim_holds_by_its_comparison(value, comparison, target, holds):
    claim = Claim(name="x", value=value, target=target, comparison=comparison)
    assert claim.holds is holds
    assert set(claim.row()) >= {"name", "value", "target", "unit", "holds", "kind"}
    json.dumps(claim.row(), allow_nan=False)


@pytest.mark.parametrize("wrong", [{"kind": "guessed"}, {"comparison": "~"}])
def test_a_claim_of_another_kind_is_refused(wrong):
    with pytest.raises(ValueError, match="must be one of"):
        Claim(name="x", value=1, target=1, **wrong)


def test_nothing_is_written_before_the_first_file(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    directory.append_turns([])
    found = {path.name for path in (tmp_path / "run").iterdir()}
    assert found == {"environment.json", "config.gin", "turns.jsonl"}


def test_an_earlier_run_is_replaced_and_other_files_stay(tmp_path):
    earlier = RunDirectory(tmp_path, config="earlier")
    earlier.append_turns([{"turn": 0}])
    (earlier.fresh_folder("disk") / "page").touch()
    earlier.write_summary({"claims": []})
    (tmp_path / "notes.txt").write_text("mine")
    later = RunDirectory(tmp_path, config="later")
    later.append_turns([{"turn": 1}])
    assert (tmp_path / "config.gin").read_text() == "later"
    assert (tmp_path / "turns.jsonl").read_text() == '{"turn": 1}\n'
    assert not (tmp_path / "summary.json").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert list(later.fresh_folder("disk").iterdir()) == []


@pytest.mark.parametrize("text", ["{}", '{"versions": []}', "[1]", "not JSON"])
def test_an_environment_file_of_something_else_makes_no_run(tmp_path, text):
    (tmp_path / "environment.json").write_text(text)
    with pytest.raises(ValueError, match="holds files that no run wrote"):
        RunDirectory(tmp_path)


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="output_dir=.*file"):
        RunDirectory(tmp_path / place)


def test_a_link_is_not_followed_to_empty_its_target(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious").touch()
    directory = RunDirectory(tmp_path / "run")
    directory.open()
    (tmp_path / "run" / "disk").symlink_to(tmp_path / "data")
    with pytest.raises(ValueError, match="move it away"):
        directory.fresh_folder("disk")
    assert (tmp_path / "data" / "precious").exists()


def test_a_summary_is_strict_json(tmp_path):
    summary = {
        "mean": np.float32(0.5),
        "counts": np.arange(3),
        "missing": math.nan,
        "claims": [Claim(name="x", value=2, target=1, unit="s", kind="simulated")],
    }
    RunDirectory(tmp_path).write_summary(summary)
    read = json.loads((tmp_path / "summary.json").read_text())
    assert read["mean"] == 0.5 and read["counts"] == [0, 1, 2]
    assert read["missing"] is None
    assert read["claims"] == [
        {
            "name": "x",
            "value": 2,
            "target": 1,
            "comparison": ">=",
            "unit": "s",
            "holds": True,
            "kind": "simulated",
        }
    ]


def test_a_summary_that_cannot_be_written_leaves_the_file_whole(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.write_summary({"good": 1})
    with pytest.raises(TypeError):
        directory.write_summary({"good": 2, "bad": object()})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"good": 1}
    assert not list(tmp_path.glob(".*"))


def test_turns_are_added_row_by_row_and_the_timeline_is_a_trace(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.append_turns([{"turn": 0}, {"turn": 1}])
    directory.append_turns([{"turn": np.int64(2)}])
    text = (tmp_path / "turns.jsonl").read_text()
    rows = [json.loads(row) for row in text.splitlines()]
    assert [row["turn"] for row in rows] == [0, 1, 2]
    directory.write_timeline({"traceEvents": []})
    with gzip.open(tmp_path / "timeline.json.gz", "rt") as file:
        assert json.load(file) == {"traceEvents": []}


def test_the_environment_says_what_a_result_depends_on(tmp_path):
    RunDirectory(tmp_path, facts={"seed": 7}).open()
    read = json.loads((tmp_path / "environment.json").read_text())
    assert read["seed"] == 7
    assert read["versions"]["jax"] and read["python"] and read["command"]
    assert read["commit"] is None or len(read["commit"].rstrip("+")) == 40


def test_the_claims_table_tells_missed_from_held():
    text = io.StringIO()
    claims = [
        Claim(name="fast enough", value=0.91, target=0.8, unit="x"),
        Claim(name="small enough", value=1234567, target=5, comparison="<="),
        Claim(name="unknown", value=None, target=True, comparison="=="),
    ]
    print_claims(claims, Console(file=text, width=100))
    fast, small, unknown = [
        ln for ln in text.getvalue().splitlines() if "enough" in ln or "unk" in ln
    ]
    assert "0.910" in fast and ">= 0.800" in fast and "holds" in fast
    assert "1,234,567" in small and "missed" in small
    assert "== yes" in unknown and "missed" in unknown


@pytest.mark.parametrize("summary", [{}, {"claims": [{"name": "x"}]}])
def test_a_summary_needs_claims(summary):
    with pytest.raises(TypeError, match="list of Claim"):
        claims_of(summary)
