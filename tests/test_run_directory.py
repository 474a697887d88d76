"""Claims hold or miss as they say."""

import pytest

from cachedattn_jax.run_directory import Claim, RunDirectory


@pytest.mark.parametrize(
    ("value", "comparison", "target", "holds"),
    [
        (0.8, ">=", 0.8, True),
        (0.79, ">=", 0.8, False),
        (1.2, "<=", 1.2, True),
        (1.21, "<=", 1.2, False),
        (True, "==", True, True),
        (False, "==", True, False),
        (None, ">=", 0.0, False),
        (float("nan"), "<=", 1.0, False),
    ],
)
def test_a_claim_holds_as_its_comparison_says(value, comparison, target, holds):
    claim = Claim(name="x", value=value, target=target, comparison=comparison)
    assert claim.holds is holds
    assert claim.row()["holds"] is holds


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.write_text("summary.json", "old")
    with pytest.raises(TypeError):
        directory.write_summary({"x": object()})
    assert (tmp_path / "summary.json").read_text() == "old"


def test_a_fresh_folder_is_empty_again(tmp_path):
    directory = RunDirectory(tmp_path)
    (directory.fresh_folder("disk") / "page").write_text("x")
    assert list(directory.fresh_folder("disk").iterdir()) == []
