"""The place of the disk tier: a TensorStore key-value store that one layout owns.

Knows URLs, the layout file, the writer's lock and worker threads. Does not know pages
or records.

    layout.json   what the bytes of a page mean; one layout owns a root
    writer.lock   held by the one process that writes to a local root
    pages/        TENANT/ab/cdef...: immutable objects, named by their key
    sessions/     TENANT/SESSION: the records
    quarantine/   TENANT/KEY.REASON: objects that were found bad
"""

import contextlib
import json
import os
import pathlib
import urllib.parse
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import tensorstore as ts

from cachedattn_jax.store.breaker import Breaker
from cachedattn_jax.store.faults import Faults, FaultyKv
from cachedattn_jax.store.guard import Guard, StorageFailure
from cachedattn_jax.store.io_config import IoConfig
from cachedattn_jax.store.layout import Layout
from cachedattn_jax.store.read_cache import ReadCache
from cachedattn_jax.store.salts import Salts
from cachedattn_jax.store.writer_lock import WriterLock

_LAYOUT_KEY = "layout.json"
_SALT_CHECK = "tenant_secret"
_IO_THREADS = 4

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
        raw = _open(url, io, is_writing)
        self._locks: list[WriterLock] = []
        if self.folder is not None and is_writing:
            self._locks.append(WriterLock(self.folder))
        try:
            if self._locks and self.folder is not None:
                _remove_leftovers(self.folder)
            plain = _guard(raw, io)
            _claim(plain, url, layout, salts or Salts(), is_writing)
            self.cache = self._open_cache(raw, cache, io) if cache else None
        except BaseException:
            self._release()
            raise
        near = self.cache or raw
        self.kv = _guard(FaultyKv(near, faults) if faults else near, io)
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
            target = self.folder / new_key
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(self.folder / key, target)
            except FileNotFoundError:
                pass
            except OSError as error:
                raise StorageFailure("io_error", str(error)) from error
            return
        found = self.kv.read(key).result()
        if found.state == "value":
            self.kv.write(new_key, found.value).result()
        self.kv.write(key, None).result()

    def close(self) -> None:
        """Waits for the work handed in, stops the threads, lets others write."""
        self._chores.shutdown(wait=True, cancel_futures=True)
        self._workers.shutdown(wait=True)
        self._writer.shutdown(wait=True)
        self._release()

    def _open_cache(self, raw: ts.KvStore, cache: CacheFolder, io: IoConfig):
        local = _open(cache.path, io, True)
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
        for lock in self._locks:
            lock.release()


def read_layout(url: str, io: IoConfig = IoConfig()) -> Layout:
    """The layout that owns a root; ValueError if there is no store."""
    try:
        found = _guard(_open(url, io, False), io).read(_LAYOUT_KEY).result()
    except StorageFailure as failure:
        raise ValueError(f"{url!r} cannot be read: {failure}") from failure
    if found.state != "value":
        raise ValueError(f"{url!r} holds no store: it has no {_LAYOUT_KEY}")
    try:
        return Layout.described(json.loads(found.value))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{url!r} holds a damaged {_LAYOUT_KEY}: {error}") from error


def local_folder(url: str) -> pathlib.Path | None:
    """The folder that a path or a file:// URL names; None for anything else."""
    if url.startswith("file://"):
        return pathlib.Path(urllib.parse.unquote(urllib.parse.urlparse(url).path))
    if "://" in url:
        return None
    return pathlib.Path(url).expanduser().absolute()


def _remove_leftovers(folder: pathlib.Path) -> None:
    """Removes the files of writes that a killed process had begun."""
    for path, _, names in os.walk(folder):
        for name in names:
            if name.endswith(".__lock"):
                os.unlink(os.path.join(path, name))


def _guard(kv: object, io: IoConfig) -> Guard:
    reading, writing = (
        Breaker(io.breaker_failures, io.breaker_rest_s) for _ in range(2)
    )
    return Guard(kv, timeout_s=io.timeout_s, reading=reading, writing=writing)


def _open(url: str, io: IoConfig, is_writing: bool) -> ts.KvStore:
    retries = {
        "max_retries": io.max_retries,
        "initial_delay": "50ms",
        "max_delay": "1s",
    }
    context = ts.Context(
        {
            "file_io_sync": io.is_synced,
            "file_io_concurrency": {"limit": 16},
            "s3_request_retries": retries,
            "gcs_request_retries": retries,
            "cache_pool": {"total_bytes_limit": 0},
        }
    )
    folder = local_folder(url)
    if folder is not None:
        _check_folder(url, folder, is_writing)
        spec: object = {"driver": "file", "path": f"{folder}/"}
    elif url.startswith("s3://"):
        spec = _s3_spec(url, io)
    else:
        spec = url if url.endswith("/") else url + "/"
    try:
        return ts.KvStore.open(spec, context=context).result(io.timeout_s)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"disk_root={url!r} cannot be opened: {_first_line(error)}"
        ) from error


def _check_folder(url: str, folder: pathlib.Path, is_writing: bool) -> None:
    if not is_writing:
        if not folder.is_dir():
            raise ValueError(f"{url!r} holds no store: there is no such folder")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"disk_root={url!r} cannot be used: {error}") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"disk_root={url!r} cannot be used: it is not writable")


def _s3_spec(url: str, io: IoConfig) -> dict[str, object]:
    """TensorStore takes no endpoint from the environment, which AWS's own tools do."""
    parsed = urllib.parse.urlparse(url)
    path = parsed.path.strip("/")
    environ = os.environ
    endpoint = (
        io.s3_endpoint
        or environ.get("AWS_ENDPOINT_URL_S3")
        or environ.get("AWS_ENDPOINT_URL")
    )
    region = io.s3_region or environ.get("AWS_REGION")
    region = region or environ.get("AWS_DEFAULT_REGION")
    spec: dict[str, object] = {"driver": "s3", "bucket": parsed.netloc}
    spec["path"] = f"{path}/" if path else ""
    if endpoint:
        spec["endpoint"] = endpoint
    if endpoint or region:
        spec["aws_region"] = region or "us-east-1"
    return spec


def _claim(kv: Guard, url: str, layout: Layout, salts: Salts, is_writing: bool) -> None:
    wanted = {**layout.describe(), _SALT_CHECK: salts.check}
    try:
        found = kv.read(_LAYOUT_KEY).result()
        if found.state != "value" and is_writing:
            text = json.dumps(wanted, indent=1, sort_keys=True)
            kv.write(_LAYOUT_KEY, text.encode()).result()
            return
    except StorageFailure as failure:
        raise ValueError(
            f"disk_root={url!r} cannot be used: {_first_line(failure)}"
        ) from failure
    _check_same(url, found.value, wanted)


def _check_same(url: str, text: bytes, wanted: dict[str, int | float | str]) -> None:
    try:
        found = json.loads(text)
        differing = [name for name in wanted if found.get(name) != wanted[name]]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"disk_root={url!r} holds a damaged {_LAYOUT_KEY}") from error
    if differing == [_SALT_CHECK]:
        raise ValueError(
            f"disk_root={url!r} was written with another tenant_secret_file; without it"
            " none of its pages can be found"
        )
    with contextlib.suppress(ValueError):
        differing.remove(_SALT_CHECK)
    if differing:
        name = differing[0]
        raise ValueError(
            f"disk_root={url!r} belongs to another layout:"
            f" its {name} is {found.get(name)!r}, this engine's is {wanted[name]!r};"
            " use another disk_root or delete this one"
        )


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].split(" [")[0]
