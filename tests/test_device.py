"""The measurements on a device: how parts are kept, and what is read from a trace."""

import json
import math

import pytest

from cachedattn_jax.engine.engine_config import EngineConfig
from cachedattn_jax.model.config import preset
from cachedattn_jax.run_directory import Claim, RunDirectory
from cachedattn_jax.store.budget import StoreConfig
from experiments import device, device_ceilings, device_links
from experiments.deadline import Deadline
from experiments.device_streams import covered_s, summarise
from experiments.model_programs import prefill_flops

MISSING = "parts missing or cut off"


def claim(value: float) -> Claim:
    return Claim(name="speed", value=value, target=1.0)


def test_a_part_that_fails_takes_nothing_with_it_and_a_resumed_run_keeps_the_rest(
    tmp_path,
):
    calls = []

    def good(directory: RunDirectory, seconds: float) -> dict:
        calls.append("good")
        return {"rate": 3.0, "claims": [claim(2.0)]}

    def flaky(directory: RunDirectory, seconds: float) -> dict:
        calls.append("flaky")
        if calls.count("flaky") == 1:
            raise RuntimeError("out of memory")
        return {"claims": [claim(0.5)]}

    parts = {"flaky": (flaky, 9.0), "good": (good, 9.0)}
    first = device.run(RunDirectory(tmp_path), parts=parts)
    assert first["missing"] == {"flaky": "RuntimeError: out of memory"}
    by_name = {c.name: c for c in first["claims"]}
    assert by_name["good: speed"].holds and not by_name[MISSING].holds

    again = device.run(RunDirectory(tmp_path), parts=parts, is_resuming=True)
    assert calls == ["flaky", "good", "flaky"]
    assert again["parts"]["good"]["rate"] == 3.0 and not again["missing"]
    by_name = {c.name: c for c in again["claims"]}
    assert by_name[MISSING].holds and not by_name["flaky: speed"].holds


def test_a_part_of_another_commit_or_device_is_measured_again(tmp_path):
    calls = []

    def part(directory: RunDirectory, seconds: float) -> dict:
        calls.append(1)
        return {"claims": []}

    device.run(RunDirectory(tmp_path), parts={"part": (part, 9.0)})
    path = tmp_path / "part" / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "device": "other"}))
    device.run(RunDirectory(tmp_path), parts={"part": (part, 9.0)}, is_resuming=True)
    assert len(calls) == 2


def test_a_part_that_is_cut_off_keeps_what_it_has_and_is_measured_again(tmp_path):
    limits = []

    def part(directory: RunDirectory, seconds: float) -> dict:
        limits.append(seconds)
        deadline = Deadline(0.0 if len(limits) == 1 else math.inf)
        rows = list(deadline.over([1, 2, 3], "case"))
        return {"rows": rows, "left_out": deadline.left_out, "claims": [claim(2.0)]}

    parts = {"part": (part, 9.0)}
    first = device.run(RunDirectory(tmp_path), parts=parts, seconds=5.0)
    assert first["missing"] == {"part": "out of time for case 2, case 3"}
    assert first["parts"]["part"]["rows"] == [1] and first["claims"][0].holds
    assert not first["claims"][-1].holds
    for _ in range(2):
        again = device.run(RunDirectory(tmp_path), parts=parts, is_resuming=True)
        assert again["parts"]["part"]["rows"] == [1, 2, 3] and not again["missing"]
    assert limits == [pytest.approx(5.0, abs=1.0), 9.0]


def test_a_deadline_leaves_out_what_would_not_end_in_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    deadline, done = Deadline(10.0), []
    for seconds in deadline.over([2.0, 5.0, 1.0, 1.0]):
        now[0] += seconds
        done.append(seconds)
    assert done == [2.0, 5.0] and deadline.left_out == ["1.0", "1.0"]
    assert deadline.left_s == 3.0


def test_no_part_begins_when_the_time_is_over_and_names_are_checked(tmp_path):
    parts = {"part": (lambda directory, seconds: {"claims": []}, 9.0)}
    late = device.run(RunDirectory(tmp_path), parts=parts, seconds=-1.0)
    assert "not begun" in late["missing"]["part"]
    with pytest.raises(ValueError, match="only='parts' is not one of part"):
        device.run(RunDirectory(tmp_path), parts=parts, only=("parts",))


def test_time_covered_counts_overlaps_once():
    copies = [(0.0, 2.0), (1.0, 3.0), (10.0, 11.0)]
    assert covered_s(copies, [(2.5, 4.0), (2.0, 2.75), (10.5, 12.0)]) == 1.5
    assert covered_s(copies, []) == 0


def test_a_stream_that_carries_pages_and_runs_kernels_is_told():
    apart = {
        "compute": {"kernel": [(0.0, 1.0)]},
        "copies": {"MemcpyH2D": [(0.5, 0.75), (0.9, 1.1)]},
    }
    streams, covered = summarise(apart)["claims"]
    assert streams.value == 0 and covered.value == pytest.approx(0.35 / 0.45)
    together = {"both": {**apart["compute"], **apart["copies"]}}
    assert summarise(together)["claims"][0].value == 1
    assert [c.value for c in summarise({})["claims"]] == [None, None]


def test_prefill_operations_are_those_of_every_product():
    config = preset("tiny")
    new, history, hidden = 8, 16, config.hidden_size
    heads = config.num_heads * config.head_dim
    kv_heads = config.num_kv_heads * config.head_dim
    layer = 2 * new * hidden * (2 * heads + 2 * kv_heads)
    layer += 3 * 2 * new * hidden * config.intermediate_size
    seen = sum(history + place + 1 for place in range(new))
    layer += 2 * 2 * seen * heads
    logits = 2 * hidden * config.vocab_size
    expected = config.num_layers * layer + logits
    counted = prefill_flops(config, new, history)
    assert counted == pytest.approx(expected, rel=1e-2)  # norms


def test_ceilings_are_rates_of_every_direction(tmp_path):
    found = device_ceilings.run(
        RunDirectory(tmp_path),
        copy_bytes=1 << 16,
        product_size=32,
        link_bytes=(1 << 12,),
        total_bytes=1 << 14,
        disk_bytes=1 << 14,
    )
    (row,) = found["links"]
    assert row["num_blocks"] == 4
    assert set(row["bytes_s"]) == set(device_ceilings.DIRECTIONS)
    rates = [*row["bytes_s"].values(), *found["disk"].values()]
    assert all(rate > 0 for rate in rates)


def test_a_point_is_served_in_every_way_and_nothing_is_recomputed_that_is_loaded(
    tmp_path,
):
    """The second point's history does not fit beside what the first one left."""
    page_bytes = 4 * 2 * 2 * 16 * 2 * 16
    found = device_links.run(
        RunDirectory(tmp_path),
        model="tiny",
        window=256,
        engine=EngineConfig(page_tokens=16, chunk_tokens=(16, 64), max_batch=2),
        store=StoreConfig(device_bytes=20 * page_bytes, host_bytes=20 * page_bytes),
        points=((128, 16), (160, 16)),
        claim=(160, 16),
        pinned_bytes=1 << 12,
        repeats=1,
    )
    for row in found["rows"]:
        assert min(row["seconds"].values()) > 0
        assert row["recomputed_tokens"]["load"] < 16
        assert row["recomputed_tokens"]["recompute"] == row["history"]
        assert row["bound_s"] >= row["seconds"]["on the device"]
