"""The main job in small: what its summary holds, and when it fails."""

import json

import numpy as np
import pytest

from cachedattn_jax.engine.engine_config import EngineConfig
from cachedattn_jax.engine.request import Request
from cachedattn_jax.engine.turn import Times, TokensFrom, Turn
from cachedattn_jax.run_directory import InvariantBroken, RunDirectory
from cachedattn_jax.store.budget import StoreConfig
from experiments import reuse
from experiments.arrivals import Arrivals
from experiments.measures import compare_tokens, spread
from experiments.sampled_lengths import SampleConfig, sample


def run_small(tmp_path, seed: int = 0) -> dict:
    page_bytes = 4 * 4 * 2 * 2 * 16 * 4
    return reuse.run(
        RunDirectory(tmp_path),
        workload=sample(
            SampleConfig(num_sessions=8, min_turns=3, arrivals=Arrivals(think_mu=0.0))
        ),
        model="tiny",
        length_scale=0.08,
        time_factor=0.0,
        engine=EngineConfig(
            page_tokens=4, max_batch=3, chunk_tokens=(8, 64), loading="always"
        ),
        store=StoreConfig(
            device_bytes=90 * page_bytes,
            host_bytes=60 * page_bytes,
            disk_bytes=2**22,
        ),
        seed=seed,
    )


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    return run_small(path), path


def test_every_prompt_token_is_accounted_for_in_both_modes(ran):
    summary, _ = ran
    for mode in summary["modes"].values():
        assert sum(mode["tokens_from"].values()) == mode["prompt_tokens"]
        computed = mode["tokens_from"]["recomputed"] + mode["tokens_from"]["new"]
        assert mode["prefill_tokens_computed"] == computed
        assert mode["prefill_tokens_padded"] >= computed
    cached, recompute = (summary["modes"][m] for m in ("cached", "recompute"))
    assert cached["prompt_tokens"] == recompute["prompt_tokens"]
    assert recompute["hit_rate"] == 0
    assert recompute["tokens_from"]["new"] == cached["tokens_from"]["new"]
    assert cached["hit_rate"] > 0.5


def test_the_modes_say_the_same(ran):
    summary, _ = ran
    comparison = summary["comparison"]
    assert comparison["tokens_identical"]
    assert comparison["turns_compared"] == summary["workload"]["num_turns"]
    for key in ("num_sessions", "num_turns", "output_tokens"):
        assert summary["modes"]["cached"][key] == summary["modes"]["recompute"][key]


def test_the_run_directory_has_a_row_a_turn_and_a_report(ran):
    summary, path = ran
    rows = [
        json.loads(line) for line in (path / "turns.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 2 * summary["workload"]["num_turns"]
    for row in rows:
        assert sum(row["tokens_from"].values()) == row["prompt_tokens"]
        assert 0 < row["prefill_s"] <= row["ttft_s"]
        assert 0 <= row["exposed_stall_s"] and row["decision_reason"]
        is_loaded = row["bytes_host_to_device"] > 0
        assert is_loaded == (row["load_s"] > 0) == (row["overlap_ratio"] is not None)
    report = (path / "report.html").read_text()
    assert report.count("<svg") == 3
    assert (path / "timeline.json.gz").stat().st_size > 0


def make_turn(reply: list[int], margins: list[float]) -> Turn:
    return Turn(
        request=Request(session_id="a", token_ids=(1,)),
        session="default/a",
        times=Times(submitted_s=0.0),
        prompt=np.asarray([1], np.int32),
        reply=reply,
        margins=margins,
        tokens_from=TokensFrom(new=1),
    )


def test_a_difference_is_found_where_it_begins_and_a_tie_is_none():
    ours = {("a", 0): make_turn([1, 2, 3, 4], [1.0, 1.0, 0.5, 1.0])}
    same = compare_tokens(ours, ours)
    assert (same.num_tokens, len(same.ties), len(same.differences)) == (4, 0, 0)
    other = {("a", 0): make_turn([1, 2, 9, 9], [1.0, 1.0, 0.4, 1.0])}
    (difference,) = compare_tokens(ours, other).differences
    assert (difference.token_index, difference.margin) == (2, 0.4)
    tied = {("a", 0): make_turn([1, 2, 9, 9], [1.0, 1.0, 0.00005, 1.0])}
    found = compare_tokens(ours, tied)
    assert (found.num_tokens, len(found.ties), len(found.differences)) == (3, 1, 0)


def test_a_run_whose_tokens_differ_fails(tmp_path, monkeypatch):
    """One wrong bit of one cached page is enough."""
    from cachedattn_jax.store.device_pool import DevicePool

    install = DevicePool.install

    def wrong(self, group, runs, bundles):
        return install(self, group, [pages * 1.5 for pages in runs], bundles)

    monkeypatch.setattr(DevicePool, "install", wrong)
    with pytest.raises(InvariantBroken, match="differs between the modes"):
        run_small(tmp_path)


def test_percentiles_leave_out_what_is_not_there():
    assert spread([1.0, None, 3.0])["mean"] == 2.0
    assert spread([None])["p99"] is None
