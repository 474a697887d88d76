"""Kills a serving process again and again, and holds what is left to what it said.

    python -m experiments.kill_trial DIR --kills 100 --seed 0

Prints a line of JSON after every kill, the sums until then. The serving processes are
forks of this one, which has imported everything and started no thread and no device:
one is ready within a second.
"""

import argparse
import dataclasses
import json
import os
import random
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cachedattn_jax.store.budget import StoreConfig
from experiments.victim import live, look_and_leave, write_scripts

NUM_SESSIONS = 8
NUM_TURNS = 8
_CHECK_EVERY = 25
_SLOWEST_START_S = 120.0
STORE = StoreConfig(
    device_bytes="6 MiB", host_bytes="64 KiB", disk_bytes="64 MiB", disk_root="unset"
)


@dataclass(kw_only=True)
class Tally:
    """What happened so far.

    Attributes:
        kills_at_start: of them, before the process was ready.
        lost: sessions whose record was said to be stored and is not found.
        wrong: tokens of a reply or of a record that differ from the script.
        returned: sessions found after they were said to be deleted for good.
        crashes: processes that ended before they were killed.
    """

    kills: int = 0
    kills_at_start: int = 0
    turns_stored: int = 0
    sessions_found: int = 0
    checks_of_the_root: int = 0
    lost: int = 0
    wrong: int = 0
    returned: int = 0
    crashes: int = 0
    orphan_bytes: int = 0


@dataclass(kw_only=True)
class Told:
    """What the processes said of one session."""

    num_turns: int = 0
    state: Literal["stored", "forgetting", "forgotten"] = "stored"


@dataclass(kw_only=True)
class Witness:
    """Listens to one life after the other and remembers what was promised."""

    tally: Tally = field(default_factory=Tally)
    sessions: dict[int, Told] = field(default_factory=dict)
    is_ready: bool = False
    has_served: bool = False

    def born(self) -> None:
        self.is_ready = self.has_served = False

    def hear(self, line: str) -> None:
        word, *rest = line.split()
        if word == "wrong":
            self.tally.wrong += 1
            print(line, file=sys.stderr)
            return
        if word == "ready":
            self.is_ready = True
            return
        if word == "orphans":
            self.tally.orphan_bytes += int(rest[0])
            return
        told = self.sessions.setdefault(int(rest[0]), Told())
        match word:
            case "found":
                self._found(told, int(rest[1]))
            case "done":
                self.has_served = True
                self.tally.turns_stored += 1
                told.num_turns, told.state = int(rest[1]), "stored"
            case "forgetting":
                told.state = "forgetting"
            case "forgot":
                told.state = "forgotten"

    def _found(self, told: Told, num_turns: int) -> None:
        """A turn that was not told of yet may be stored already."""
        self.tally.sessions_found += num_turns > 0
        allowed = {
            "stored": (told.num_turns, told.num_turns + 1),
            "forgetting": (told.num_turns, 0, 1),
            "forgotten": (0, 1),
        }[told.state]
        if num_turns not in allowed:
            is_lost = told.state == "stored"
            self.tally.lost += is_lost
            self.tally.returned += not is_lost
            print(f"found {num_turns} turns, {told}", file=sys.stderr)
        told.num_turns, told.state = num_turns, "stored"


def fork(work: Callable[[int], None]) -> tuple[int, int]:
    """Runs `work` with the end of a pipe in a process of its own.

    Returns:
        Its id and the other end.
    """
    ours, theirs = os.pipe()
    process = os.fork()
    if process:
        os.close(theirs)
        return process, ours
    status = 1
    try:
        os.close(ours)
        work(theirs)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def listen(pipe: int, witness: Witness, until_s: Callable[[], float]) -> bool:
    """Hears lines until a moment that may depend on them; whether the pipe is open."""
    rest = b""
    while (left_s := until_s() - time.monotonic()) > 0:
        if not select.select([pipe], [], [], min(left_s, 0.05))[0]:
            continue
        data = os.read(pipe, 65536)
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            witness.hear(line.decode())
        if not data:
            return False
    return True


def one_life(folder: Path, witness: Witness, rng: random.Random) -> None:
    """Starts a process, kills it at a random moment, and hears it to the end."""
    witness.born()
    seed = rng.randrange(2**32)
    process, pipe = fork(
        lambda out: live(folder / "root", folder / "scripts.json", out, seed, STORE)
    )
    kills_early = rng.random() < 0.3
    started_s = time.monotonic()
    pause_s = rng.uniform(0, 2.0) if kills_early else rng.uniform(0, 0.8)
    moment_s: list[float] = []

    def until_s() -> float:
        if not moment_s and (kills_early or witness.has_served):
            moment_s.append(time.monotonic() + pause_s)
        return moment_s[0] if moment_s else started_s + _SLOWEST_START_S

    is_alive = listen(pipe, witness, until_s)
    witness.tally.kills_at_start += not witness.is_ready
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    witness.tally.crashes += not is_alive
    if is_alive:
        listen(pipe, witness, lambda: float("inf"))
    os.close(pipe)
    witness.tally.kills += 1


def check_root(folder: Path, witness: Witness) -> None:
    """Lets a process collect orphans and end well; then nothing may be left over."""
    witness.born()
    process, pipe = fork(
        lambda out: look_and_leave(folder / "root", folder / "scripts.json", out, STORE)
    )
    listen(pipe, witness, lambda: float("inf"))
    os.close(pipe)
    _, status = os.waitpid(process, 0)
    witness.tally.crashes += status != 0
    witness.tally.checks_of_the_root += 1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder, rng = options.folder, random.Random(options.seed)
    process, pipe = fork(
        lambda _: write_scripts(
            folder / "scripts.json", NUM_SESSIONS, NUM_TURNS, options.seed
        )
    )
    os.close(pipe)
    assert os.waitpid(process, 0)[1] == 0, "no scripts"
    witness = Witness()
    for count in range(1, options.kills + 1):
        one_life(folder, witness, rng)
        if count % _CHECK_EVERY == 0 or count == options.kills:
            check_root(folder, witness)
        print(json.dumps(dataclasses.asdict(witness.tally)), flush=True)


if __name__ == "__main__":
    main()
