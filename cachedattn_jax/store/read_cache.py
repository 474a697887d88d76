"""A local folder in front of an object store: a fourth tier, of pages only.

Knows objects, bytes and who was used last. Does not verify: what comes from here is
checked like all that is read, and pages never change.
"""

import contextlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tensorstore as ts

from cachedattn_jax.store.writer_lock import LOCK_NAME

_PAGES = "pages/"
_LOCAL_TIMEOUT_S = 5.0


class _Later:
    """A result that is made from another when it is asked for."""

    def __init__(
        self,
        future: Any,
        finish: Callable[[Any], Any],
        on_failure: Callable[[], object] = lambda: None,
    ) -> None:
        self._future = future
        self._finish = finish
        self._on_failure = on_failure

    def result(self, timeout: float | None = None) -> Any:
        try:
            found = self._future.result(timeout)
        except (ValueError, OSError):
            self._on_failure()
            raise
        return self._finish(found)

    def cancel(self) -> None:
        self._future.cancel()


class ReadCache:
    """A key-value store whose pages are kept in a folder, too, under a byte budget.

    Args:
        remote: the object store, which has everything.
        local: a store of the folder.
        folder: what lies there from an earlier run is used.

    Attributes:
        counters: pages found here and fetched, bytes of both.
    """

    def __init__(
        self, remote: Any, local: Any, folder: Path, capacity_bytes: int
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self.counters: Counter[str] = Counter()
        self._remote = remote
        self._local = local
        self._lock = threading.Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._under_way: dict[str, Any] = {}
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and name != LOCK_NAME and not name.endswith(".__lock"):
                self._keep(name, path.stat().st_size)

    def list(self, *args: Any, **kwargs: Any) -> Any:
        return self._remote.list(*args, **kwargs)

    def read(self, key: str, byte_range: slice | None = None, **options: Any) -> Any:
        if not key.startswith(_PAGES):
            return self._remote.read(key, **_range(byte_range), **options)
        with self._lock:
            size = self._sizes.get(key)
            if size is not None:
                self._sizes.move_to_end(key)
        if size is not None:
            near = self._local.read(key, **_range(byte_range))
            return _Later(near, lambda found: self._near(key, found))
        whole = self._fetch(key)
        return _Later(
            whole,
            lambda found: self._far(key, found, byte_range),
            lambda: self._under_way.pop(key, None),
        )

    def write(self, key: str, value: bytes | bytearray | None, **options: Any) -> Any:
        if not key.startswith(_PAGES):
            return self._remote.write(key, value, **options)
        if value is None:
            self._drop(key)
            return self._remote.write(key, None, **options)
        done = self._remote.write(key, value, **options)
        return _Later(done, lambda stamp: self._written(key, value, stamp))

    def _fetch(self, key: str) -> Any:
        """The read of a whole page; its layer groups share it."""
        with self._lock:
            whole = self._under_way.get(key)
            if whole is None:
                whole = self._under_way[key] = self._remote.read(key)
            return whole

    def _near(self, key: str, found: Any) -> Any:
        self._count("cache_hits", len(found.value))
        if found.state != "value":  # somebody has cleaned the folder
            self._drop(key)
        return found

    def _far(self, key: str, found: Any, byte_range: slice | None) -> Any:
        with self._lock:
            is_first = self._under_way.pop(key, None) is not None
        if found.state != "value":
            return found
        if is_first:
            self._count("cache_fetches", len(found.value))
            self._put(key, found.value)
        part = found.value if byte_range is None else found.value[byte_range]
        return ts.KvStore.ReadResult(state="value", value=part, stamp=found.stamp)

    def _written(self, key: str, value: bytes | bytearray, stamp: Any) -> Any:
        self._put(key, value)
        return stamp

    def _put(self, key: str, value: bytes | bytearray) -> None:
        if len(value) > self.capacity_bytes:
            return
        with self._lock:
            leaving = self._keep(key, len(value))
        for name in leaving:
            self._write_near(name, None)
        self._write_near(key, value)

    def _keep(self, key: str, size: int) -> Sequence[str]:
        """Charges an object; who has to leave for it."""
        self.used_bytes += size - self._sizes.pop(key, 0)
        self._sizes[key] = size
        leaving = []
        while self.used_bytes > self.capacity_bytes:
            name, freed = self._sizes.popitem(last=False)
            self.used_bytes -= freed
            leaving.append(name)
        return leaving

    def _drop(self, key: str) -> None:
        with self._lock:
            self.used_bytes -= self._sizes.pop(key, 0)
        self._write_near(key, None)

    def _write_near(self, key: str, value: bytes | bytearray | None) -> None:
        # A folder that fails costs a fetch later; the object store has everything.
        with contextlib.suppress(ValueError, OSError):
            self._local.write(key, value).result(_LOCAL_TIMEOUT_S)

    def _count(self, name: str, num_bytes: int) -> None:
        with self._lock:
            self.counters[name] += 1
            self.counters[f"{name}_bytes"] += num_bytes


def _range(byte_range: slice | None) -> dict[str, slice]:
    return {} if byte_range is None else {"byte_range": byte_range}
