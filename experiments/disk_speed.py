"""Claim: the disk tier moves pages nearly as fast as a plain file is read and written.

Writes the same bytes twice in every round, as page objects through the disk tier and as
one plain file, drops both from the page cache, and reads them again. Checksums are
computed and verified; nothing is fsynced in either case. With 1, 4 and 16 pages under
way at any time: when the oldest is done the next one begins.

Both ways have the same chances: files are made anew in either, those of the round
before are gone; what was written is on the disk before the other way begins, and both
are dropped from the page cache before each of them is read; who goes first changes from
round to round, and the first round, in which the machine finds its memory, does not
count.

    cachedattn run configs/disk_speed.gin        2 CPU cores, about 4 minutes

Expected: reading at least 0.8x of the plain file, writing at least 0.7x, with as many
pages at once as suit.
"""

import os
import statistics
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cachedattn_jax.run_directory import Claim, RunDirectory
from cachedattn_jax.store.budget import StoreConfig
from cachedattn_jax.store.disk_read import DiskRead
from cachedattn_jax.store.disk_tier import DiskTier, object_name
from cachedattn_jax.store.layout import Layout
from cachedattn_jax.store.link import Copy, Links
from cachedattn_jax.store.objects.root import Root
from cachedattn_jax.store.page_index import PageEntry


def run(
    run_directory: RunDirectory,
    *,
    store: StoreConfig = StoreConfig(),
    page_tokens: tuple[int, ...] = (16, 32, 64),
    layers_per_group: int = 4,
    num_bytes: int = 2**30,
    outstanding: tuple[int, ...] = (1, 4, 16),
    rounds: int = 3,
    seed: int = 0,
) -> dict[str, object]:
    """Times both ways in turns, on pages of an 8B model (2 MiB for 16 tokens).

    Args:
        store: where the root is, and limits of its operations; without a `disk_root`
            it is made inside the run directory.
        num_bytes: of all pages of a round.
        outstanding: pages that are read or written at once.
        rounds: that count.
    """
    rng = np.random.default_rng(seed)
    folder = Path(store.disk_root or run_directory.fresh_folder("disk"))
    rows = []
    for tokens in page_tokens:
        layout = _layout(tokens, layers_per_group)
        for count in outstanding:
            bench = _Bench(folder, layout, store, num_bytes, count, rng)
            title = f"pages of {layout.page_bytes / 2**20:.0f} MiB, {count} at once"
            times = [bench.round(number) for number in track(range(rounds + 1), title)]
            bench.close()
            rows.append(_row(layout, count, num_bytes, times[1:]))
    _print(rows)
    return {"rows": rows, "claims": _claims(rows)}


def _layout(page_tokens: int, layers_per_group: int) -> Layout:
    """Llama-3-8B's."""
    return Layout(
        num_layers=32,
        layers_per_group=layers_per_group,
        num_kv_heads=8,
        head_dim=128,
        page_tokens=page_tokens,
        dtype="bfloat16",
        rope="none",
        weights="noise",
    )


class _Bench:
    """Pages of noise, and a plain file of the same bytes."""

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        store: StoreConfig,
        num_bytes: int,
        count: int,
        rng: np.random.Generator,
    ) -> None:
        self._count = count
        self._folder = folder / f"{layout.page_tokens}-{count}"
        self._root = Root(str(self._folder), layout, store.io)
        dtype = np.dtype(np.uint16)
        links = Links(None, None)
        self._disk = DiskTier(self._root, layout, 2 * num_bytes, dtype, links)
        # Few different pages: the data need not be new, only not zero.
        noise = rng.integers(0, 2**16, (4, layout.page_bytes // 2), dtype)
        shape = (layout.num_groups, 1, *layout.group_shape)
        self._groups = [list(page.reshape(shape)) for page in noise]
        self._plain = [page.tobytes() for page in noise]
        tokens = np.zeros(layout.page_tokens, np.int32)
        self._entries = [
            PageEntry(key=rng.bytes(32), session="bench/", token_ids=tokens)
            for _ in range(num_bytes // layout.page_bytes)
        ]

    def round(self, number: int) -> dict[str, float]:
        """Seconds of each of the four ways."""
        plain_first = number % 2 == 0
        times = {}
        writes = [("plain write", self._write_plain), ("write", self._write)]
        for way, work in writes if plain_first else reversed(writes):
            self._remove(way)
            self._touch_memory()
            times[way] = _timed(work)
            self._sync(way)
        reads = [("plain read", self._read_plain), ("read", self._read)]
        for way, work in reads if plain_first else reversed(reads):
            self._drop_caches()
            self._touch_memory()
            times[way] = _timed(work)
        return times

    def close(self) -> None:
        for way in ("plain write", "write"):
            self._remove(way)
        self._root.close()

    def _write(self) -> None:
        under_way: deque[Copy] = deque()
        for index, entry in enumerate(self._entries):
            if len(under_way) == self._count:
                _ = under_way.popleft().span
            groups = self._groups[index % len(self._groups)]
            under_way.append(self._disk.write(entry, groups, 0))
        for copy in under_way:
            _ = copy.span

    def _read(self) -> None:
        under_way: deque[DiskRead] = deque()
        for entry in self._entries:
            if len(under_way) == self._count:
                _finish(under_way.popleft())
            under_way.append(self._disk.read([entry]))
        for read in under_way:
            _finish(read)

    def _write_plain(self) -> None:
        with (self._folder / "plain").open("xb", buffering=0) as file:
            for index in range(len(self._entries)):
                file.write(self._plain[index % len(self._plain)])

    def _read_plain(self) -> None:
        size = len(self._plain[0])
        buffer = bytearray(size)
        with (self._folder / "plain").open("rb", buffering=0) as file:
            while file.readinto(buffer) == size:
                pass

    def _touch_memory(self) -> None:
        """Free memory of a virtual machine may have to come from its host at first."""
        np.ones(len(self._entries) * len(self._plain[0]), np.uint8)

    def _paths(self, way: str) -> list[Path]:
        if way == "plain write":
            return [self._folder / "plain"]
        return [self._folder / object_name(entry) for entry in self._entries]

    def _remove(self, way: str) -> None:
        """Removes what the round before has written."""
        for path in self._paths(way):
            path.unlink(missing_ok=True)

    def _sync(self, way: str) -> None:
        for path in self._paths(way):
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def _drop_caches(self) -> None:
        for path in (*self._paths("plain write"), *self._paths("write")):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _finish(read: DiskRead) -> None:
    """Waits until the last layer group is there and was verified."""
    read.parts[-1].result()
    assert not read.bad(), read.bad()


def _timed(work) -> float:
    started_s = time.monotonic()
    work()
    return time.monotonic() - started_s


def _row(layout: Layout, count: int, num_bytes: int, times: Sequence[dict]) -> dict:
    """Rates of the median round, and the medians of the ratios within rounds."""
    rates = {
        way: num_bytes / statistics.median(t[way] for t in times) for way in times[0]
    }
    ratios = {
        way: statistics.median(t[f"plain {way}"] / t[way] for t in times)
        for way in ("read", "write")
    }
    page_mib = layout.page_bytes / 2**20
    return {"page_mib": page_mib, "outstanding": count, "rates": rates, **ratios}


def _claims(rows: Sequence[dict]) -> list[Claim]:
    """Of each page size with the number of pages at once that suits it best."""
    return [
        Claim(
            name=f"{way} over plain file, {page_mib:.0f} MiB pages",
            value=max(row[way] for row in rows if row["page_mib"] == page_mib),
            target=target,
            unit="x",
        )
        for page_mib in sorted({row["page_mib"] for row in rows})
        for way, target in (("read", 0.8), ("write", 0.7))
    ]


def _print(rows: Sequence[dict]) -> None:
    table = Table(title="GB/s, cold cache, checksums on", title_justify="left")
    ways = ("read", "plain read", "write", "plain write")
    for name in ("page MiB", "at once", *ways, "read x", "write x"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row['page_mib']:.0f}",
            str(row["outstanding"]),
            *[f"{row['rates'][way] / 1e9:.2f}" for way in ways],
            f"{row['read']:.2f}",
            f"{row['write']:.2f}",
        )
    Console().print(table)
