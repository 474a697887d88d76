"""Claim: whatever happens to the process or the disk, no token is wrong.

Two trials. One kills the serving process with SIGKILL at random moments, at least 200
times, and holds every restart to what was said to be stored before. The other injects
faults of every kind under the tiers, 10,000 and more, while turns are served. Replies
are compared with those of an engine without a store.

    make torture        2 CPU cores, about 15 minutes

Expected: no wrong token, no lost session, no orphan byte, no crash, no leak, and every
fault in a counter.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from cachedattn_jax.run_directory import Claim, RunDirectory
from experiments.fault_trial import LONGEST_STALL_S

_CHECKOUT = Path(__file__).parent.parent


def run(
    run_directory: RunDirectory,
    *,
    num_kills: int = 200,
    num_faults: int = 10_000,
    num_processes: int = 2,
    seed: int = 0,
) -> dict[str, object]:
    """Runs both trials, each spread over some processes with seeds of their own.

    Args:
        num_kills, num_faults: of all processes together.
    """
    folder = run_directory.fresh_folder("roots")
    kills = _trials(
        folder, "kill", "--kills", num_kills, num_processes=num_processes, seed=seed
    )
    run_directory.write_json("kills.json", kills)
    faults = _trials(
        folder, "fault", "--faults", num_faults, num_processes=num_processes, seed=seed
    )
    killed, struck = _sum(kills), _sum(faults)
    _print(killed, struck)
    return {
        "kills": killed,
        "faults": struck,
        "claims": [
            *_kill_claims(killed, num_kills),
            *_fault_claims(struck, num_faults),
        ],
    }


def _trials(
    folder: Path, name: str, option: str, count: int, *, num_processes: int, seed: int
) -> list[dict]:
    """Runs a trial in several processes; the last line of each is its result."""
    processes = []
    for index in range(num_processes):
        place = folder / f"{name}{index}"
        place.mkdir()
        share = count // num_processes + (index < count % num_processes)
        command = [sys.executable, "-m", f"experiments.{name}_trial", str(place)]
        command += [option, str(share), "--seed", str(seed + index)]
        processes.append(
            subprocess.Popen(
                command, cwd=_CHECKOUT, stdout=subprocess.PIPE, text=True, env=_env()
            )
        )
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"{name} trial", total=count)
        results = _listen(processes, bar, task)
    for process in processes:
        if process.wait():
            raise RuntimeError(f"a {name} trial ended with {process.returncode}")
    return results


def _listen(processes: Sequence[subprocess.Popen], bar: Progress, task: TaskID):
    results: list[dict] = [{} for _ in processes]
    for index, process in enumerate(processes):
        assert process.stdout is not None
        for line in process.stdout:
            results[index] = json.loads(line)
            done = (
                r.get("kills", 0) + sum(r.get("injected", {}).values()) for r in results
            )
            bar.update(task, completed=sum(done))
    return results


def _env() -> dict[str, str]:
    # The trials fork before they use jax; a pool of threads would not survive that.
    return {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def _sum(results: Sequence[dict]) -> dict:
    """Numbers added up, dicts and lists joined, the longest of times."""
    total: dict = {}
    for name in results[0]:
        values = [result[name] for result in results]
        if name.startswith("longest"):
            total[name] = max(values)
        elif isinstance(values[0], bool):
            total[name] = all(values)
        elif isinstance(values[0], dict):
            joined: Counter = Counter()
            for value in values:
                joined.update(value)
            total[name] = dict(joined)
        else:
            total[name] = sum(values, type(values[0])())
    return total


def _kill_claims(killed: dict, num_kills: int) -> list[Claim]:
    zero = {
        "lost": "sessions lost that were said to be stored",
        "wrong": "wrong tokens after kill -9",
        "returned": "deleted sessions that came back",
        "crashes": "processes that ended by themselves",
        "orphan_bytes": "orphan bytes after collection",
    }
    return [
        Claim(
            name="kill -9 at random moments", value=killed["kills"], target=num_kills
        ),
        *[
            Claim(name=text, value=killed[name], target=0, comparison="==")
            for name, text in zero.items()
        ],
    ]


def _fault_claims(struck: dict, num_faults: int) -> list[Claim]:
    injected, seen = struck["injected"], struck["seen"]
    hidden = sum(
        max(0, injected[kind] - count)
        for kind, count in seen.items()
        if kind in injected
    )
    read = injected["short_read"] + injected["bit_flip"]
    hidden += max(0, read - seen["short_read or bit_flip or torn_write"])
    hidden += struck["torn_and_not_found"]
    zero = {
        "wrong tokens under faults": struck["wrong"],
        "turns that ended with an error": struck["crashes"],
        "leaks of slots, leases, memory, threads, files": len(struck["leaks"]),
        "faults that no counter shows": hidden,
        "sessions lost, torn records apart": struck["sessions_lost_unexplained"],
        "kinds of fault that never struck": sum(n == 0 for n in injected.values()),
    }
    total = sum(injected.values())
    return [
        Claim(name="faults injected", value=total, target=num_faults),
        *[
            Claim(name=text, value=value, target=0, comparison="==")
            for text, value in zero.items()
        ],
        Claim(
            name="the store heals by itself",
            value=struck["has_healed"],
            target=True,
            comparison="==",
        ),
        Claim(
            name="longest batch of turns under faults",
            value=struck["longest_batch_s"],
            target=LONGEST_STALL_S,
            comparison="<=",
            unit="s",
        ),
    ]


def _print(killed: dict, struck: dict) -> None:
    table = Table(title="What was tried and what happened", title_justify="left")
    for column in ("what", "how often", "what happened"):
        table.add_column(column)
    table.add_row(
        "kill -9 while serving or starting",
        f"{killed['kills']} ({killed['kills_at_start']} at the start)",
        f"{killed['turns_stored']} turns stored, {killed['sessions_found']} sessions"
        f" found again, {killed['lost']} lost, {killed['wrong']} wrong,"
        f" {killed['orphan_bytes']} orphan bytes",
    )
    for kind, count in struck["injected"].items():
        seen = {k: n for k, n in struck["seen"].items() if kind in k.split(" or ")}
        text = ", ".join(f"{n} in the counters of {k}" for k, n in seen.items())
        table.add_row(f"fault: {kind}", str(count), text)
    table.add_row(
        "turns served under faults",
        str(struck["turns"]),
        f"{struck['wrong']} wrong, {struck['crashes']} ended with an error,"
        f" breakers opened {struck['times_breaker_opened']} times",
    )
    Console().print(table)
