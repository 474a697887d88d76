"""A short part of `make torture`: kill -9 and faults under a running workload."""

import json
import os
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parent.parent


def trial(name: str, *arguments: str) -> dict:
    """The result of a trial in a process of its own, which has no device yet."""
    single = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{name}_trial", *arguments],
        cwd=CHECKOUT,
        env={**os.environ, **single},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_no_session_is_lost_and_no_token_wrong_after_kill_9(tmp_path):
    found = trial("kill", str(tmp_path), "--kills", "6", "--seed", "11")
    assert found["kills"] == 6 and found["turns_stored"] > 0
    wrong = ("lost", "wrong", "returned", "crashes", "orphan_bytes")
    assert {name: found[name] for name in wrong} == dict.fromkeys(wrong, 0)


def test_faults_of_every_kind_cost_no_token_and_leak_nothing(tmp_path):
    found = trial("fault", str(tmp_path), "--faults", "400", "--seed", "12", "--cold")
    assert min(found["injected"].values()) > 0
    assert found["leaks"] == [] and found["has_healed"]
    wrong = (
        "wrong",
        "crashes",
        "torn_and_not_found",
        "sessions_lost_unexplained",
    )
    assert {name: found[name] for name in wrong} == dict.fromkeys(wrong, 0)
    for kind, count in found["seen"].items():
        assert count >= found["injected"].get(kind, 0), kind
