"""The place of the disk tier: a TensorStore key-value store that one layout owns.

Knows the writer's lock, faults and worker threads. Does not know pages or records.

    layout.json   what the bytes of a page mean; one layout owns a root
    writer.lock   held by the one process that writes to a local root
    pages/        TENANT/ab/cdef...: immutable objects, named by their key
    sessions/     TENANT/SESSION: the records
    quarantine/   TENANT/KEY.REASON: objects that were found bad
"""

import os
import pathlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from cachedattn_jax.store.layout import Layout
from cachedattn_jax.store.objects.faults import Faults, FaultyKv
from cachedattn_jax.store.objects.folder_kv import UNFINISHED, FolderKv
from cachedattn_jax.store.objects.guard import guarded
from cachedattn_jax.store.objects.io_config import IoConfig
from cachedattn_jax.store.objects.layout_file import claim_root
from cachedattn_jax.store.objects.object_kv import ObjectKv
from cachedattn_jax.store.objects.open_kv import local_folder, open_kv
from cachedattn_jax.store.objects.read_cache import ReadCache
from cachedattn_jax.store.objects.salts import Salts
from cachedattn_jax.store.objects.writer_lock import WriterLock

_IO_THREADS = 8

Result = TypeVar("Result")


class CacheFolder(NamedTuple):
    """Where pages of an object store are kept near by, and how many bytes of them."""

    path: str
    num_bytes: int


class Root:
    """An opened store root.

    Args:
        url: a path, or a TensorStore URL such as file://, s3://, gs:// or memory://.
        faults: strike operations of pages and records.
        cache: a local folder that keeps pages of an object store, too.
        is_writing: whether it may be written to; needs the lock of a local root.

    Attributes:
        kv: the guarded store; every operation of pages and records goes through it.
        is_shared: whether other processes may write to it at the same time.
        cache: the folder in front of an object store, if there is one.

    Raises:
        ValueError: the root cannot be opened or written, another layout owns it, its
            tenants have another secret, or another process writes to it.
    """

    def __init__(
        self,
        url: str,
        layout: Layout,
        io: IoConfig = IoConfig(),
        salts: Salts | None = None,
        *,
        faults: Faults | None = None,
        cache: "CacheFolder | None" = None,
        is_writing: bool = True,
    ) -> None:
        self.url = url
        self.folder = local_folder(url)
        self.is_shared = self.folder is None and not url.startswith("memory:")
        raw = open_kv(url, io, is_writing)
        self._opened = [raw]
        self._timeout_s = io.timeout_s
        self._locks: list[WriterLock] = []
        if self.folder is not None and is_writing:
            self._locks.append(WriterLock(self.folder))
        try:
            if self._locks and self.folder is not None:
                _remove_leftovers(self.folder)
            plain = guarded(raw, io)
            claim_root(plain, url, layout, salts or Salts(), is_writing)
            self.cache = self._open_cache(raw, cache, io) if cache else None
        except BaseException:
            self._release()
            raise
        near = self.cache or raw
        self.kv = guarded(FaultyKv(near, faults) if faults else near, io)
        self._workers = ThreadPoolExecutor(_IO_THREADS, thread_name_prefix="store-io")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="store-records")
        self._chores = ThreadPoolExecutor(1, thread_name_prefix="store-chores")

    def list(self, prefix: str) -> list[str]:
        """Names under a folder, without the folder; reads no object."""
        return list(self.kv.list(prefix))

    def submit(self, work: Callable[..., Result], *args: object) -> "Future[Result]":
        """Runs `work` on a worker thread."""
        return self._workers.submit(work, *args)

    def submit_in_order(
        self, work: Callable[..., Result], *args: object
    ) -> "Future[Result]":
        """Runs `work` after all that was handed in here before."""
        return self._writer.submit(work, *args)

    def submit_chore(
        self, work: Callable[..., Result], *args: object
    ) -> "Future[Result]":
        """Runs `work` when nobody waits for it, one after the other."""
        return self._chores.submit(work, *args)

    def rename(self, key: str, new_key: str) -> None:
        """Gives an object another name; the old one is free then.

        Raises:
            StorageFailure: it cannot be read or written.
        """
        if self.folder is not None:
            self.kv.rename(key, new_key).result()
            return
        found = self.kv.read(key).result()
        if found.state == "value":
            self.kv.write(new_key, [found.value]).result()
        self.kv.write(key, None).result()

    def close(self) -> None:
        """Waits for the work handed in, stops the threads, lets others write."""
        self._chores.shutdown(wait=True, cancel_futures=True)
        self._workers.shutdown(wait=True)
        self._writer.shutdown(wait=True)
        self._release()

    def _open_cache(
        self, raw: FolderKv | ObjectKv, cache: CacheFolder, io: IoConfig
    ) -> ReadCache:
        local = open_kv(cache.path, io, True)
        self._opened.append(local)
        folder = local_folder(cache.path)
        if folder is None or not self.is_shared:
            raise ValueError(
                f"cache_root={cache.path!r} must be a folder, in front of an object"
                f" store; disk_root is {self.url!r}"
            )
        self._locks.append(WriterLock(folder))
        _remove_leftovers(folder)
        return ReadCache(raw, local, folder, cache.num_bytes)

    def _release(self) -> None:
        for kv in self._opened:
            kv.close(self._timeout_s)
        for lock in self._locks:
            lock.release()


def _remove_leftovers(folder: pathlib.Path) -> None:
    """Removes the files of writes that a killed process had begun."""
    for path, _, names in os.walk(folder):
        for name in names:
            if name.endswith(UNFINISHED):
                os.unlink(os.path.join(path, name))
