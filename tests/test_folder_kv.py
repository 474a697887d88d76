"""Pages of a local root: system calls under the guard, readable by TensorStore."""

import os
import threading

import numpy as np
import pytest
import tensorstore as ts

from cachedattn_jax.store.objects.breaker import Breaker
from cachedattn_jax.store.objects.fault_config import FaultConfig
from cachedattn_jax.store.objects.faults import Faults, FaultyKv
from cachedattn_jax.store.objects.folder_kv import FolderKv
from cachedattn_jax.store.objects.guard import Guard, StorageFailure
from cachedattn_jax.store.objects.object_kv import ObjectKv

NAME = "pages/t/ab/cd"
DATA = np.random.default_rng(0).bytes(100_000)


class Opened:
    """A folder under a guard, with TensorStore's own view of it."""

    def __init__(self, folder, kinds=(), **options):
        self.folder = folder
        self.plain = ts.KvStore.open(f"file://{folder}/").result()
        self.raw = FolderKv(ObjectKv(self.plain), folder, is_synced=False)
        self.faults = Faults(FaultConfig(rate=1.0 if kinds else 0.0, kinds=kinds))
        self.guard = Guard(
            FaultyKv(self.raw, self.faults),
            reading=Breaker(3, 60.0),
            writing=Breaker(3, 60.0),
            timeout_s=options.get("timeout_s", 10.0),
        )

    def write(self, *pieces):
        return self.guard.write(NAME, pieces).result()

    def read(self, *sizes):
        """Parts of so many bytes: how many there were of each, and all bytes."""
        parts = [[bytearray(size)] for size in sizes]
        reads = self.guard.read_parts(NAME, parts)
        return [read.result() for read in reads], b"".join(p[0] for p in parts)


@pytest.fixture
def opened(tmp_path):
    stores = []

    def opening(*kinds, **options):
        stores.append(Opened(tmp_path, kinds, **options))
        return stores[-1]

    yield opening
    for store in stores:
        store.raw.close(10.0)


def reason_of(call) -> str:
    with pytest.raises(StorageFailure) as caught:
        call()
    return caught.value.reason


def test_tensorstore_reads_what_was_written_and_the_other_way_round(opened):
    store = opened()
    store.write(DATA[:7], memoryview(DATA)[7:60_000], bytearray(DATA[60_000:]))
    assert store.plain.read(NAME).result().value == DATA
    store.plain.write(NAME, DATA[::-1]).result()
    assert store.read(100_000) == ([100_000], DATA[::-1])
    store.guard.write(NAME, None).result()
    assert store.plain.read(NAME).result().state == "missing"
    store.guard.write(NAME, None).result()  # once more is no failure


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        ((1000, 60_000, 39_000), [1000, 60_000, 39_000]),
        ((20_000, 1), [20_000, 1]),
        ((90_000, 20_000, 5), [90_000, 10_000, 0]),
    ],
)
def test_parts_are_read_in_order_and_an_object_may_end_early(opened, sizes, found):
    store = opened()
    store.write(DATA)
    counts, data = store.read(*sizes)
    assert counts == found
    assert data[: sum(found)] == DATA[: sum(found)]


def test_a_missing_object_is_no_failure(opened):
    store = opened()
    assert store.read(10, 10)[0] == [None, None]
    assert not store.guard.counters["read_failed_io_error"]


def test_many_pieces_are_one_object(opened):
    store = opened()
    store.write(*[DATA[at : at + 10] for at in range(0, 100_000, 10)])
    counts, data = store.read(*[25] * 4000)
    assert counts == [25] * 4000 and data == DATA


def test_what_cannot_be_read_or_written_says_so(opened, tmp_path):
    store = opened()
    (tmp_path / NAME).mkdir(parents=True)
    assert reason_of(lambda: store.read(10)) == "io_error"
    assert reason_of(lambda: store.write(DATA)) == "io_error"
    assert [path.name for path in (tmp_path / NAME).parent.iterdir()] == ["cd"]


def test_a_read_that_hangs_ends_in_time_and_holds_up_no_other(opened, tmp_path):
    store = opened(timeout_s=0.1)
    pipe = tmp_path / NAME
    pipe.parent.mkdir(parents=True)
    os.mkfifo(pipe)  # to open it waits for a writer
    assert reason_of(lambda: store.read(10, 10)) == "timeout"
    assert store.guard.counters["read_failed_timeout"] == 1
    store.guard.write("pages/t/ab/other", [DATA]).result()
    store.raw.close(0.1)
    os.close(os.open(pipe, os.O_WRONLY))


def test_a_write_that_was_given_up_does_not_appear_later(opened, tmp_path):
    store = opened(timeout_s=0.1)
    pipe = tmp_path / f"{NAME}.0.__lock"
    pipe.parent.mkdir(parents=True)
    os.mkfifo(pipe)  # to open it waits for a reader
    assert reason_of(lambda: store.write(b"some bytes")) == "timeout"
    with pipe.open("rb") as reader:
        assert reader.read() == b"some bytes"
    store.raw.close(10.0)
    assert list(pipe.parent.iterdir()) == []


def test_writes_under_way_are_not_listed(opened, tmp_path):
    store = opened()
    store.write(DATA)
    (tmp_path / f"{NAME}.7.__lock").write_bytes(b"half")
    assert list(store.guard.list("pages/")) == ["t/ab/cd"]


def test_faults_of_reads_strike_the_part_that_is_waited_for(opened):
    opened().write(DATA)
    store = opened("bit_flip")
    counts, data = store.read(100_000)
    differing = np.frombuffer(data, np.uint8) ^ np.frombuffer(DATA, np.uint8)
    assert counts == [100_000] and np.unpackbits(differing).sum() == 1
    store = opened("short_read")
    assert store.read(50_000, 50_000)[0][1] < 50_000
    assert store.faults.injected["short_read"] == 2
    store = opened("hang", timeout_s=0.05)
    reads = store.guard.read_parts(NAME, [[bytearray(10)], [bytearray(10)]])
    assert reason_of(reads[0].result) == "timeout"
    assert store.faults.injected["hang"] == 1


def test_a_torn_write_leaves_a_part_of_the_pieces(opened):
    store = opened("torn_write")
    store.write(DATA[:50_000], DATA[50_000:])
    kept = store.plain.read(NAME).result().value
    assert len(kept) < 100_000 and DATA.startswith(kept)
    assert store.faults.torn == {NAME}


@pytest.mark.parametrize(
    ("kind", "reason"), [("error", "io_error"), ("hang", "timeout")]
)
def test_a_rename_ends_in_time_and_is_counted(opened, kind, reason):
    opened().write(DATA)
    store = opened(kind, timeout_s=0.05)
    for _ in range(3):
        assert reason_of(store.guard.rename(NAME, "quarantine/t/x").result) == reason
    assert store.guard.counters[f"write_failed_{reason}"] == 3
    assert store.guard.writing.is_open
    store = opened()
    store.guard.rename(NAME, "quarantine/t/x").result()
    store.guard.rename("pages/t/none", "quarantine/t/y").result()
    assert store.plain.read("quarantine/t/x").result().value == DATA
    assert list(store.guard.list("pages/")) == []


def test_no_thread_or_file_is_left(opened):
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    store = opened()
    store.write(DATA)
    store.read(10, 10)
    store.raw.close(10.0)
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) <= files + 1  # TensorStore's folder
