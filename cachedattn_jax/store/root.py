"""The place of the disk tier: a TensorStore key-value store that one layout owns.

Knows URLs, the layout file and worker threads. Does not know pages or records.
"""

import json
import os
import pathlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import tensorstore as ts

from cachedattn_jax.store.layout import Layout

_LAYOUT_KEY = "layout.json"
_IO_THREADS = 4

Result = TypeVar("Result")


class Root:
    """An opened store root.

    Args:
        url: a path, or a TensorStore URL such as file://, s3://, gs:// or memory://.

    Raises:
        ValueError: the root cannot be opened or written, or another layout owns it.
    """

    def __init__(self, url: str, layout: Layout) -> None:
        self.url = url
        self.kv = _open(url)
        self._claim(layout)
        self._workers = ThreadPoolExecutor(_IO_THREADS, thread_name_prefix="store-io")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="store-records")

    def list(self, prefix: str) -> list[str]:
        """Names under a folder, without the folder; reads no object."""
        # "0" is the character after "/".
        keys = ts.KvStore.KeyRange(prefix, prefix.removesuffix("/") + "0")
        found = self.kv.list(keys, strip_prefix_length=len(prefix)).result()
        return [name.decode() for name in found]

    def submit(self, work: Callable[..., Result], *args: object) -> "Future[Result]":
        """Runs `work` on a worker thread."""
        return self._workers.submit(work, *args)

    def write_in_order(self, key: str, value: bytes | None) -> "Future[None]":
        """Writes, or with None deletes, a small object after those before it."""
        return self._writer.submit(lambda: self.kv.write(key, value).result() and None)

    def close(self) -> None:
        """Waits for the work handed in and stops the threads."""
        self._workers.shutdown(wait=True)
        self._writer.shutdown(wait=True)

    def _claim(self, layout: Layout) -> None:
        wanted = layout.describe()
        try:
            found = self.kv.read(_LAYOUT_KEY).result()
            if found.state != "value":
                text = json.dumps(wanted, indent=1, sort_keys=True)
                self.kv.write(_LAYOUT_KEY, text.encode()).result()
                return
        except (ValueError, OSError) as error:
            raise ValueError(
                f"disk_root={self.url!r} cannot be used: {_first_line(error)}"
            ) from error
        _check_same(self.url, found.value, wanted)


def _open(url: str) -> ts.KvStore:
    context = ts.Context(
        {
            "file_io_sync": False,
            "file_io_concurrency": {"limit": 16},
            "cache_pool": {"total_bytes_limit": 0},
        }
    )
    spec: object = url if url.endswith("/") else url + "/"
    if "://" not in url:
        path = pathlib.Path(url).expanduser().absolute()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"disk_root={url!r} cannot be used: {error}") from error
        if not os.access(path, os.W_OK):
            raise ValueError(f"disk_root={url!r} cannot be used: it is not writable")
        spec = {"driver": "file", "path": f"{path}/"}
    try:
        return ts.KvStore.open(spec, context=context).result()
    except (ValueError, OSError) as error:
        raise ValueError(
            f"disk_root={url!r} cannot be opened: {_first_line(error)}"
        ) from error


def _check_same(url: str, text: bytes, wanted: dict[str, int | float | str]) -> None:
    try:
        found = json.loads(text)
        differing = [name for name in wanted if found.get(name) != wanted[name]]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"disk_root={url!r} holds a damaged {_LAYOUT_KEY}") from error
    if differing:
        name = differing[0]
        raise ValueError(
            f"disk_root={url!r} belongs to another layout:"
            f" its {name} is {found.get(name)!r}, this engine's is {wanted[name]!r};"
            " use another disk_root or delete this one"
        )


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].split(" [")[0]
