"""Claim: an engine whose tiers are always full runs on in the same memory.

Conversations come, go on, end and are forgotten while every tier is far too small, so
that pages move all the time. Memory is sampled after every batch of turns.

    cachedattn run configs/soak.gin        2 CPU cores, 5 minutes and a start

Expected: memory flat within 5 %, budgets never exceeded, no wrong token, and no batch
of turns slower than the time-out of one operation.
"""

import dataclasses
import io
import os
import resource
import time

import numpy as np
from rich.console import Console
from rich.progress import Progress

from cachedattn_jax.engine.engine import Engine
from cachedattn_jax.run_directory import Claim, RunDirectory
from cachedattn_jax.store.budget import StoreConfig
from experiments.fault_trial import leaks
from experiments.victim import Victim, make_engine, read_scripts, write_scripts

# Memory of the first part is that of allocators and caches filling up.
_WARM_SHARE = 0.2


def run(
    run_directory: RunDirectory,
    *,
    store: StoreConfig = StoreConfig(),
    duration_s: float = 300.0,
    num_sessions: int = 24,
    num_turns: int = 8,
    seed: int = 0,
) -> dict[str, object]:
    """Serves for so long and looks at memory, budgets and times.

    Args:
        store: tiers of a few pages; the disk root is made inside the run directory.
    """
    folder = run_directory.fresh_folder("soak")
    write_scripts(folder / "scripts.json", num_sessions, num_turns, seed)
    config = dataclasses.replace(store, disk_root=str(folder / "root"))
    with make_engine(config) as engine:
        engine.warm_up()
        scripts = read_scripts(folder / "scripts.json")
        victim = Victim(engine, scripts, io.StringIO(), is_patient=False)
        samples, broken = _serve(victim, duration_s, np.random.default_rng(seed))
        left, stats, totals = leaks(engine), engine.stats(), engine.totals
    warm = [rss for share, rss in samples if share >= _WARM_SHARE]
    growth = max(warm) / warm[0] - 1
    Console().print(
        f"{sum(totals.turns.values())} turns, {len(samples)} batches;"
        f" {warm[0] / 2**20:.0f} to {max(warm) / 2**20:.0f} MiB of memory;"
        f" evicted: {stats.describe()['evictions']}",
        highlight=False,
    )
    return {
        "memory_bytes": [rss for _, rss in samples[:: max(1, len(samples) // 200)]],
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "longest_batch_s": victim.longest_batch_s,
        "store": stats.describe(),
        "totals": totals.describe(),
        "claims": [
            Claim(
                name="growth of memory after the first fifth",
                value=growth,
                target=0.05,
                comparison="<=",
            ),
            _zero("budgets exceeded, batches", broken),
            _zero("wrong tokens", victim.num_wrong),
            _zero("leaks", len(left)),
            Claim(
                name="longest batch of turns",
                value=victim.longest_batch_s,
                target=store.io.timeout_s,
                comparison="<=",
                unit="s",
            ),
        ],
    }


def _zero(name: str, value: int) -> Claim:
    return Claim(name=name, value=value, target=0, comparison="==")


def _serve(
    victim: Victim, duration_s: float, rng: np.random.Generator
) -> tuple[list[tuple[float, int]], int]:
    """(share of the time, resident bytes) after each batch; batches over a budget."""
    samples: list[tuple[float, int]] = []
    broken, started_s = 0, time.monotonic()
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("soak", total=duration_s)
        while (passed_s := time.monotonic() - started_s) < duration_s:
            victim.serve(rng)
            # Up to 200,000 events are kept, which would look like a leak.
            victim.engine.timeline.events.clear()
            samples.append((passed_s / duration_s, _resident_bytes()))
            broken += _is_over_budget(victim.engine)
            bar.update(task, completed=passed_s)
    return samples, broken


def _is_over_budget(engine: Engine) -> bool:
    stats = engine.stats()
    used, capacity = stats.used_bytes, stats.capacity_bytes
    return any(used[tier] > capacity[tier] for tier in used)


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
