"""Claim: copies run on streams of their own, while the compute stream computes.

Profiles one turn that loads its history behind another prefill, and reads from the
trace which stream each copy was on, and for how much of its time kernels ran.

    cachedattn run configs/h200.gin --gin_bindings 'device.run.only = ("streams",)'

Expected on CUDA: no copy between host and device on a stream that kernels run on; at
least 80 % of the copy time covered by kernels.
"""

import math
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from cachedattn_jax.engine.engine_config import EngineConfig
from cachedattn_jax.model.config import preset
from cachedattn_jax.model.llama import init_params
from cachedattn_jax.run_directory import Claim, RunDirectory
from cachedattn_jax.store.budget import StoreConfig
from cachedattn_jax.timeline import busy_s
from experiments.preload_bench import AUTO, PreloadBench

Span = tuple[float, float]
_COPIES = {"MemcpyH2D": "to the device", "MemcpyD2H": "to the host"}
# Of copies between device memories, or of no use: neither kernels nor copies to count.
_NEITHER = ("MemcpyD2D", "Memset", "MemcpyP2P")


def run(
    run_directory: RunDirectory,
    *,
    model: str,
    dtype: str = "bfloat16",
    engine: EngineConfig,
    store: StoreConfig,
    history: int = 6144,
    new: int = 1024,
    seed: int = 0,
    seconds: float = math.inf,
) -> dict:
    """Profiles a turn of each direction: one that loads, then one that is saved.

    Args:
        seconds: it takes what it takes.
    """
    config = preset(model, dtype=dtype)
    params = init_params(config, seed)
    bench = PreloadBench(config, params, engine, [AUTO], history, new, store, seed)
    try:
        bench.turn(AUTO, None)
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                bench.turn(AUTO, None)
            streams, longest = read_streams(Path(folder)), longest_kernels(Path(folder))
    finally:
        bench.close()
    return {**summarise(streams), "longest_kernels": longest}


def read_streams(folder: Path) -> dict[str, dict[str, list[Span]]]:
    """Spans in seconds by stream and by what ran: a kind of copy, or "kernel"."""
    return {name: _spans(events) for name, events in _events(folder)}


def longest_kernels(folder: Path, count: int = 25) -> list[dict]:
    """The kernels that took the most time in all."""
    seconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for _, events in _events(folder):
        for event in events:
            seconds[event.name] += 1e-9 * event.duration_ns
            calls[event.name] += 1
    return [
        {"name": name, "calls": calls[name], "seconds": taken}
        for name, taken in seconds.most_common(count)
    ]


def _events(folder: Path) -> Iterator[tuple[str, list]]:
    """What ran on each stream."""
    for path in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines if plane.name.startswith("/device:GPU") else ():
                if line.name.startswith("Stream"):
                    yield f"{plane.name} {line.name}", list(line.events)


def _spans(events: Iterable) -> dict[str, list[Span]]:
    found: dict[str, list[Span]] = defaultdict(list)
    for event in events:
        kind = next((k for k in (*_COPIES, *_NEITHER) if k in event.name), "kernel")
        start_s = 1e-9 * event.start_ns
        found[kind].append((start_s, start_s + 1e-9 * event.duration_ns))
    return dict(found)


def summarise(streams: Mapping[str, Mapping[str, list[Span]]]) -> dict:
    """What the trace says, with its claims; they do not hold where there is no GPU."""
    kernels = [span for kinds in streams.values() for span in kinds.get("kernel", ())]
    rows = [
        {
            "stream": name,
            "what": kind,
            "count": len(spans),
            "busy_s": busy_s(spans),
            "covered_by_kernels": covered_s(spans, kernels) / busy_s(spans),
        }
        for name, kinds in streams.items()
        for kind, spans in kinds.items()
    ]
    table = Table(title="Streams", title_justify="left")
    for name in ("stream", "what", "count", "ms", "while kernels ran"):
        table.add_column(name)
    for row in rows:
        table.add_row(
            row["stream"],
            row["what"],
            str(row["count"]),
            f"{1e3 * row['busy_s']:.2f}",
            f"{row['covered_by_kernels']:.0%}",
        )
    Console().print(table)
    busy = {row["stream"] for row in rows if row["what"] == "kernel"}
    loads = [row for row in rows if row["what"] == "MemcpyH2D"]
    copies = [row for row in rows if row["what"] in _COPIES]
    # A copy in the middle of a program, such as of an argument, is not one of ours.
    large = [row for row in copies if row["busy_s"] > 1e-3]
    total_s = sum(row["busy_s"] for row in loads)
    covered = sum(row["busy_s"] * row["covered_by_kernels"] for row in loads)
    return {
        "rows": rows,
        "claims": [
            Claim(
                name="streams that carry pages and run kernels",
                value=sum(row["stream"] in busy for row in large) if large else None,
                target=0,
                comparison="==",
            ),
            Claim(
                name="time of copies to the device while kernels ran",
                value=covered / total_s if total_s else None,
                target=0.8,
            ),
        ],
    }


def covered_s(spans: Iterable[Span], others: Iterable[Span]) -> float:
    """For how long of these spans any of the others was under way."""
    spans, others = list(spans), list(others)
    return busy_s(spans) + busy_s(others) - busy_s([*spans, *others])
