"""Serves from a store that fails all the time, and counts what became of the faults.

    python -m experiments.fault_trial DIR --faults 10000 --seed 0

Prints a line of JSON at the end. Every reply is compared with that of an engine without
a store. After the faults stop the store has to heal, and everything has to be given
back: slots, leases, host memory, threads, files.
"""

import argparse
import dataclasses
import io
import json
import os
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cachedattn_jax.engine.engine import Engine
from cachedattn_jax.store.audit import Audit
from cachedattn_jax.store.budget import StoreConfig
from cachedattn_jax.store.objects.fault_config import FAULTS, FaultConfig
from cachedattn_jax.store.objects.io_config import IoConfig
from cachedattn_jax.store.page_index import PageEntry
from cachedattn_jax.store.placement.tier import Tier
from experiments.victim import Victim, make_engine, read_scripts, write_scripts

NUM_SESSIONS = 24
NUM_TURNS = 8
# Now and then nearly everything fails for some batches of turns.
_STORM_RATE = 0.9
# Faults under way at the end that may find nothing to strike, and then do not count.
_MAY_BE_SPARED = 32
_BATCHES_OF_CALM, _BATCHES_OF_STORM = 30, 5
TIMEOUT_S = 0.1
# Of one batch of turns: its time-outs one after the other, until the breaker opens.
LONGEST_STALL_S = 20 * TIMEOUT_S
IO = IoConfig(timeout_s=TIMEOUT_S, breaker_failures=6, breaker_rest_s=0.05)
# Tiers so small that every turn moves pages through all of them.
STORE = StoreConfig(
    device_bytes="0.6 MiB",
    host_bytes="128 KiB",
    disk_bytes="16 MiB",
    disk_root="unset",
)


@dataclass(kw_only=True)
class FaultTally:
    """What was injected, and what was seen of it.

    Attributes:
        injected: by kind.
        seen: by kind, what counters that such a fault moves say.
        crashes: turns that ended with an error.
        leaks: what was not given back, in words.
    """

    injected: dict[str, int] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)
    turns: int = 0
    wrong: int = 0
    crashes: int = 0
    leaks: list[str] = field(default_factory=list)
    longest_batch_s: float = 0.0
    times_breaker_opened: int = 0
    has_healed: bool = False
    torn_and_not_found: int = 0
    sessions_lost_unexplained: int = 0


def run_trial(
    folder: Path, num_faults: int, rate: float, seed: int, *, is_warm: bool = True
) -> FaultTally:
    """Serves until so many faults were injected, heals, and looks at what is left.

    Args:
        is_warm: whether all programs are compiled before, so that times mean something.
    """
    scripts = folder / "scripts.json"
    write_scripts(scripts, NUM_SESSIONS, NUM_TURNS, seed)
    tally = FaultTally()
    faults = FaultConfig(rate=rate, seed=seed, latency_s=0.02)
    config = dataclasses.replace(
        STORE,
        disk_root=str(folder / "root"),
        io=dataclasses.replace(IO, faults=faults),
    )
    threads, files = set(threading.enumerate()), num_files()
    engine = make_engine(config)
    told = io.StringIO()
    victim = Victim(engine, read_scripts(scripts), told, is_patient=False)
    rng = np.random.default_rng(seed)
    assert engine.store.faults is not None and engine.store.root is not None
    injecting, batch = engine.store.faults, 0
    injecting.rate = 0.0  # compiling is no turn that could do without
    if is_warm:
        engine.warm_up()
    while injecting.injected.total() < num_faults + _MAY_BE_SPARED:
        cycle = batch % (_BATCHES_OF_CALM + _BATCHES_OF_STORM)
        injecting.rate = rate if cycle < _BATCHES_OF_CALM else _STORM_RATE
        batch += 1
        _serve(victim, rng, tally)
        if batch % 50 == 0:
            progress = {"num_injected": injecting.injected.total()}
            print(json.dumps(progress), flush=True)
    engine.store.faults.heal()
    tally.has_healed = _heals(victim, rng, tally)
    tally.leaks += leaks(engine)
    torn = set(engine.store.faults.torn)
    _count(engine, tally)
    engine.close()
    tally.leaks += [f"thread {t.name}" for t in set(threading.enumerate()) - threads]
    tally.leaks += ["files"] * max(0, num_files() - files)
    tally.wrong = victim.num_wrong
    _look_back(config, victim, torn, tally)
    return tally


def _serve(victim: Victim, rng: np.random.Generator, tally: FaultTally) -> None:
    try:
        tally.turns += victim.serve(rng)
    except Exception as error:  # a turn must never end with one
        tally.crashes += 1
        print(f"crash: {error!r}", file=sys.stderr, flush=True)
    tally.longest_batch_s = max(tally.longest_batch_s, victim.longest_batch_s)


def _heals(victim: Victim, rng: np.random.Generator, tally: FaultTally) -> bool:
    """Whether the disk is used again, and every record is stored, without help."""
    store = victim.engine.store
    assert store.root is not None
    kv, end_s = store.root.kv, time.monotonic() + 60
    before = kv.counters["write_operations"], kv.counters["read_operations"]
    while time.monotonic() < end_s:
        _serve(victim, rng, tally)
        is_closed = kv.reading.state == kv.writing.state == "closed"
        now = kv.counters["write_operations"], kv.counters["read_operations"]
        is_used = now[0] > before[0] + 100 and now[1] > before[1] + 100
        if is_closed and is_used and not store.catalog.num_unstored:
            return True
    return False


def _count(engine: Engine, tally: FaultTally) -> None:
    store = engine.store
    assert store.faults is not None and store.root is not None
    kv = store.root.kv
    counters = Counter(kv.counters) + store.counters
    ours = ("copy_failed", "save_failures", "fetch_failures")
    corrupt = [n for name, n in counters.items() if name.startswith("corrupt_")]
    tally.injected = {kind: store.faults.injected[kind] for kind in FAULTS}
    tally.seen = {
        "error": _failed(counters, "io_error"),
        "permission": _failed(counters, "permission"),
        "disk_full": _failed(counters, "disk_full"),
        "hang": _failed(counters, "timeout"),
        "latency": counters["read_slow"] + counters["write_slow"],
        "short_read or bit_flip or torn_write": sum(corrupt),
        "host_error": sum(
            n for name, n in counters.items() if name.removeprefix("miss_") in ours
        ),
    }
    tally.counters = dict(sorted(counters.items()))
    tally.times_breaker_opened = kv.reading.num_opened + kv.writing.num_opened


def _failed(counters: Counter[str], reason: str) -> int:
    return counters[f"read_failed_{reason}"] + counters[f"write_failed_{reason}"]


def leaks(engine: Engine) -> list[str]:
    """What an idle engine holds and should not, in words."""
    store = engine.store
    store.saver.drain()
    resident = list(store.index.in_tier(Tier.DEVICE))
    slabs: dict[int, int] = {}
    held: list[PageEntry] = []
    for tier in Tier:
        held += [entry for entry in store.index.in_tier(tier) if entry.holds]
    for entry in store.index.in_tier(Tier.HOST):
        if entry.slab is not None:
            slabs[id(entry.slab)] = entry.slab.num_bytes
    found = {
        "slots": len(resident) + store.pool.num_free != store.pool.num_slots,
        "leases": bool(held),
        "host memory": store.host.used_bytes != sum(slabs.values()),
        "write buffer": store.saver.buffered_bytes != 0,
        "host budget": store.host.used_bytes > store.host.capacity_bytes,
        "disk budget": store.disk is not None
        and not 0 <= store.disk.used_bytes <= store.disk.capacity_bytes,
    }
    return [name for name, is_leaking in found.items() if is_leaking]


def num_files() -> int:
    """Open file descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


def _look_back(
    config: StoreConfig, victim: Victim, torn: set[str], tally: FaultTally
) -> None:
    """A healthy start on what is left: torn objects are found, the rest is right."""
    assert config.disk_root is not None
    with Audit(config.disk_root) as audit:
        pages = set(audit.pages())
        torn_pages = torn & pages
        bad = {f.name for f in audit.verify(sorted(pages)) if f.reason is not None}
        tally.torn_and_not_found = len(torn_pages - bad)
        healthy = dataclasses.replace(config, io=IoConfig())
    expected = list(victim.num_turns)
    with make_engine(healthy) as engine:
        after = Victim(engine, victim.scripts, io.StringIO())
        after.look_around()
        for index, (turns, found) in enumerate(
            zip(expected, after.num_turns, strict=True)
        ):
            is_torn = f"sessions/default/s{index}" in torn
            is_lost = turns != found and not is_torn
            tally.sessions_lost_unexplained += is_lost
            if is_lost:
                print(f"s{index}: {found} for {turns} turns", file=sys.stderr)
        rng = np.random.default_rng(0)
        for _ in range(20):
            _serve(after, rng, tally)
        tally.wrong += after.num_wrong


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--faults", type=int, required=True)
    parser.add_argument("--rate", type=float, default=0.25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cold", action="store_true", help="compile when needed")
    options = parser.parse_args()
    tally = run_trial(
        options.folder,
        options.faults,
        options.rate,
        options.seed,
        is_warm=not options.cold,
    )
    print(json.dumps(dataclasses.asdict(tally)), flush=True)


if __name__ == "__main__":
    main()
