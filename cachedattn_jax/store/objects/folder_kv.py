"""A local folder as a key-value store: pages by system calls, all else by TensorStore.

Knows files and threads. Does not know what pages hold.

Pages are megabytes, so every pass over them shows. They are read into the memory that
they are wanted in, and written from the memory that they lie in. Names and bytes are
those of TensorStore's file driver: each reads what the other has written.
"""

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cachedattn_jax.store.objects.buffers import Buffers, cut, num_bytes
from cachedattn_jax.store.objects.file_threads import Call, FileThreads
from cachedattn_jax.store.objects.object_kv import ObjectKv
from cachedattn_jax.store.objects.object_names import PAGES

# Names that end so are of writes under way: TensorStore does not list them.
UNFINISHED = ".__lock"

# A read occupies one from the first layer group to the last, and pages of one turn are
# wanted group by group: as many at once as a run has, or the last would come too late.
_MAX_THREADS = 16
# Of a vector of pieces, POSIX allows as many.
_MAX_PIECES = 1024
# Reads ahead grow from the size of the first read, in ever larger pieces of page cache.
# A first read of a whole page of 2 MiB comes in pieces of 4 KiB: 1.6 GB/s from a disk
# that gives 2.5 to one large file; after one of 16 KiB it is 2.1, after 4 KiB 2.3.
_FIRST_READ_BYTES = 4 * 1024


class FolderKv:
    """A folder; results are futures.

    Args:
        kv: TensorStore's store of the same folder.
        is_synced: whether a write is done when the device has it.
    """

    def __init__(self, kv: ObjectKv, folder: Path, is_synced: bool) -> None:
        self._kv = kv
        self._folder = folder
        self._is_synced = is_synced
        self._threads = FileThreads(_MAX_THREADS, "store-files")
        self._numbers = itertools.count()

    def list(self, *args: Any, **kwargs: Any) -> Any:
        return self._kv.list(*args, **kwargs)

    def read(self, key: str, **options: Any) -> Any:
        return self._kv.read(key, **options)

    def read_parts(self, key: str, parts: Sequence[Buffers]) -> Sequence[Call]:
        """Reads the beginning of an object to where it is wanted, part by part.

        The result of each is how many bytes there were, None for no such object.
        """
        reads = [Call() for _ in parts]
        self._threads.submit(_read, self._path(key), parts, reads)
        return reads

    def write(self, key: str, value: Buffers | None, **options: Any) -> Any:
        if not key.startswith(PAGES):
            return self._kv.write(key, value, **options)
        if value is None:
            return self._threads.submit(self._delete, key)
        return self._threads.submit(self._write, key, value)

    def rename(self, key: str, new_key: str) -> Call:
        """Gives an object another name; one that is not there stays away."""
        return self._threads.submit(self._rename, key, new_key)

    def close(self, timeout_s: float) -> None:
        """Ends the threads; waits for what they do, but not longer than this."""
        self._threads.close(timeout_s)

    def _path(self, key: str) -> str:
        return os.path.join(self._folder, key)

    def _write(self, call: Call, key: str, value: Buffers) -> None:
        path = self._path(key)
        unfinished = f"{path}.{next(self._numbers)}{UNFINISHED}"
        try:
            _write_file(unfinished, value, self._is_synced)
            if call.is_void:  # it counts as failed, and must not appear after that
                raise TimeoutError
            os.replace(unfinished, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(unfinished)
            raise
        self._sync_folder(path)

    def _delete(self, call: Call, key: str) -> None:
        path = self._path(key)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
            self._sync_folder(path)

    def _rename(self, call: Call, key: str, new_key: str) -> None:
        path = self._path(new_key)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.replace(self._path(key), path)
            self._sync_folder(path)

    def _sync_folder(self, path: str) -> None:
        if not self._is_synced:
            return
        folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _read(call: Call, path: str, parts: Sequence[Buffers], reads: list[Call]) -> None:
    """Reads one part after the other; each has its end, whatever happens."""
    waiting = [read for read in reads if read.set_running_or_notify_cancel()]
    if not waiting:
        return
    try:
        start = 0
        with _opened(path) as descriptor:
            for buffers, read in zip(parts, reads, strict=True):
                if read.is_void:
                    raise TimeoutError
                read.set_result(_read_part(descriptor, start, buffers))
                start += num_bytes(buffers)
    except BaseException as error:
        for read in reads:
            if read.done():
                continue
            if isinstance(error, FileNotFoundError):
                read.set_result(None)
            else:
                read.set_exception(error)


def _read_part(descriptor: int, start: int, buffers: Buffers) -> int:
    wanted, done = num_bytes(buffers), 0
    while done < wanted:
        limit = _FIRST_READ_BYTES if start + done == 0 else None
        pieces = cut(buffers, done, limit)[:_MAX_PIECES]
        num_read = os.preadv(descriptor, pieces, start + done)
        done += num_read
        if not num_read:
            break
    return done


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write_file(path: str, value: Buffers, is_synced: bool) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        descriptor = os.open(path, flags, 0o666)
    try:
        wanted, done = num_bytes(value), 0
        while done < wanted:
            done += os.writev(descriptor, cut(value, done)[:_MAX_PIECES])
        if is_synced:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
