"""A local folder in front of an object store: a fourth tier, of pages only.

Knows objects, bytes and who was used last. Does not verify: what comes from here is
checked like all that is read, and pages never change.
"""

import contextlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tensorstore as ts

from cachedattn_jax.store.objects.buffers import Buffers, num_bytes
from cachedattn_jax.store.objects.folder_kv import UNFINISHED
from cachedattn_jax.store.objects.object_kv import Later, put_found
from cachedattn_jax.store.objects.object_names import PAGES
from cachedattn_jax.store.objects.writer_lock import LOCK_NAME

_LOCAL_TIMEOUT_S = 5.0


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
        self.counters: Counter[str] = Counter()
        self._remote = remote
        self._local = local
        self._lock = threading.Lock()
        # Held while files come and go: a removal must not overtake a write.
        self._moving = threading.Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._under_way: dict[str, Any] = {}
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and name != LOCK_NAME and not name.endswith(UNFINISHED):
                self._sizes[name] = path.stat().st_size
        self.used_bytes = sum(self._sizes.values())
        self._make_room(0)

    def list(self, *args: Any, **kwargs: Any) -> Any:
        return self._remote.list(*args, **kwargs)

    def read(self, key: str, byte_range: slice | None = None, **options: Any) -> Any:
        if not key.startswith(PAGES):
            return self._remote.read(key, **_range(byte_range), **options)
        if self._has(key):
            near = self._local.read(key, **_range(byte_range))
            return Later(near, lambda found: self._near(key, found))
        whole = self._fetch(key)
        return Later(
            whole,
            lambda found: self._far(key, found, byte_range),
            lambda: self._under_way.pop(key, None),
        )

    def read_parts(self, key: str, parts: Sequence[Buffers]) -> Sequence[Any]:
        """Reads the beginning of an object to where it is wanted, part by part.

        The result of each is how many bytes there were, None for no such object.
        """
        if self._has(key):
            near = self._local.read_parts(key, parts)
            return [Later(read, partial(self._near_size, key)) for read in near]
        reads, start = [], 0
        for buffers in parts:
            stop = start + num_bytes(buffers)
            found = self.read(key, slice(start, stop))
            reads.append(Later(found, partial(put_found, buffers)))
            start = stop
        return reads

    def write(self, key: str, value: Buffers | None, **options: Any) -> Any:
        if not key.startswith(PAGES):
            return self._remote.write(key, value, **options)
        if value is None:
            self._drop(key)
            return self._remote.write(key, None, **options)
        done = self._remote.write(key, value, **options)
        return Later(done, lambda stamp: self._written(key, value, stamp))

    def _fetch(self, key: str) -> Any:
        """The read of a whole page; its layer groups share it."""
        with self._lock:
            whole = self._under_way.get(key)
            if whole is None:
                whole = self._under_way[key] = self._remote.read(key)
            return whole

    def _has(self, key: str) -> bool:
        """Whether an object is kept near by; it counts as used now."""
        with self._lock:
            if key not in self._sizes:
                return False
            self._sizes.move_to_end(key)
            return True

    def _near(self, key: str, found: Any) -> Any:
        is_there = found.state == "value"
        self._near_size(key, len(found.value) if is_there else None)
        return found

    def _near_size(self, key: str, size: int | None) -> int | None:
        self._count("cache_hits", size or 0)
        if size is None:  # somebody has cleaned the folder
            self._drop(key)
        return size

    def _far(self, key: str, found: Any, byte_range: slice | None) -> Any:
        with self._lock:
            is_first = self._under_way.pop(key, None) is not None
        if found.state != "value":
            return found
        if is_first:
            self._count("cache_fetches", len(found.value))
            self._put(key, [found.value])
        part = found.value if byte_range is None else found.value[byte_range]
        return ts.KvStore.ReadResult(state="value", value=part, stamp=found.stamp)

    def _written(self, key: str, value: Buffers, stamp: Any) -> Any:
        self._put(key, value)
        return stamp

    def _put(self, key: str, value: Buffers) -> None:
        size = num_bytes(value)
        if size > self.capacity_bytes:
            return
        with self._moving:
            self._make_room(size, but=key)
            self._write_near(key, value)
            # Not before: who finds it here reads it here.
            with self._lock:
                self._sizes[key] = size
                self.used_bytes += size

    def _drop(self, key: str) -> None:
        with self._moving:
            with self._lock:
                self.used_bytes -= self._sizes.pop(key, 0)
            self._write_near(key, None)

    def _make_room(self, size: int, but: str | None = None) -> None:
        """Removes those not used for longest; takes back the charge of `but`."""
        leaving = []
        with self._lock:
            self.used_bytes -= self._sizes.pop(but, 0) if but else 0
            while self._sizes and self.used_bytes + size > self.capacity_bytes:
                name, freed = self._sizes.popitem(last=False)
                self.used_bytes -= freed
                leaving.append(name)
        for name in leaving:
            self._write_near(name, None)

    def _write_near(self, key: str, value: Buffers | None) -> None:
        # A folder that fails costs a fetch later; the object store has everything.
        with contextlib.suppress(ValueError, OSError):
            self._local.write(key, value).result(_LOCAL_TIMEOUT_S)

    def _count(self, name: str, num_bytes: int) -> None:
        with self._lock:
            self.counters[name] += 1
            self.counters[f"{name}_bytes"] += num_bytes


def _range(byte_range: slice | None) -> dict[str, slice]:
    return {} if byte_range is None else {"byte_range": byte_range}
