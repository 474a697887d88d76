"""Small objects that change: written in order, each only over what it was made from.

Knows names, bytes and generations. Does not know what they say.

A write whose outcome is unknown, since it took too long, may still be done later. So
every write names the generation it replaces: a late one finds another and is void.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future

from cachedattn_jax.store.objects.guard import StorageFailure
from cachedattn_jax.store.objects.root import Root

# A record that could not be written is tried again after so long.
_AGAIN_S = 0.5
_MAX_TRIES = 4


class RecordConflict(Exception):
    """Another replica has changed the session since this one read it."""


class RecordWriter:
    """Writes records; those that failed are tried again until they are stored.

    Args:
        on_conflict: called with a name whose object another process has changed.
    """

    def __init__(self, root: Root, on_conflict: Callable[[str], None]) -> None:
        self.generations: dict[str, bytes] = {}
        self._root = root
        self._on_conflict = on_conflict
        # Latest bytes of each name until they are stored, and all that were tried.
        self._latest: dict[str, bytes | None] = {}
        self._attempts: dict[str, list[bytes | None]] = {}
        self._failed: set[str] = set()
        self._again_s = 0.0

    @property
    def num_unstored(self) -> int:
        """Names whose latest bytes are not stored yet."""
        return len(self._latest)

    def is_pending(self, name: str) -> bool:
        """Whether the latest bytes of a name are not stored yet."""
        return name in self._latest

    def write(self, name: str, data: bytes | None) -> "Future[None]":
        """Stores bytes, or with None deletes the object, after the writes before.

        The future ends when that is done, and fails with StorageFailure if the first
        try did, or with RecordConflict.
        """
        self._latest[name] = data
        return self._root.submit_in_order(self._store, name, data)

    def poll(self) -> None:
        """Tries again what has failed, if there is hope."""
        now = time.monotonic()
        if not self._failed or now < self._again_s or self._root.kv.writing.is_open:
            return
        self._again_s = now + _AGAIN_S
        self.try_again()

    def try_again(self) -> "list[Future[None]]":
        """Tries again at once what has failed."""
        names = [name for name in list(self._failed) if name in self._latest]
        self._failed.difference_update(names)
        return [self.write(name, self._latest[name]) for name in names]

    def _store(self, name: str, data: bytes | None) -> None:
        try:
            for _ in range(_MAX_TRIES):
                if self._try(name, data):
                    break
            else:
                raise StorageFailure("contended", name)
        except StorageFailure:
            self._attempts.setdefault(name, []).append(data)
            self._failed.add(name)
            self._root.kv.count("record_write_failures")
            raise
        except RecordConflict:
            self._forget(name, data)
            self._root.kv.count("record_conflicts")
            self._on_conflict(name)
            raise
        self._forget(name, data)
        self._root.kv.count("records_written")

    def _try(self, name: str, data: bytes | None) -> bool:
        """Whether the bytes are stored; False if another try is needed."""
        is_first_of_shared = self._root.is_shared and name not in self.generations
        if data is not None and (name in self._attempts or is_first_of_shared):
            self._learn_generation(name)
        expected = None if data is None else self.generations.get(name)
        value = None if data is None else [data]
        stamp = self._root.kv.write(name, value, expected).result()
        if expected is not None and not stamp.generation:
            self._learn_generation(name)
            return False
        self.generations[name] = stamp.generation
        return True

    def _learn_generation(self, name: str) -> None:
        """Reads what is there now; another writer's is a conflict."""
        # Where nobody else writes, what it says is of no interest.
        nothing = None if self._root.is_shared else slice(0, 0)
        found = self._root.kv.read(name, nothing).result()
        is_there = found.state == "value"
        is_ours = not is_there or found.value in self._attempts.get(name, ())
        known = self.generations.get(name)
        if self._root.is_shared and not is_ours and found.stamp.generation != known:
            raise RecordConflict(name)
        self.generations[name] = found.stamp.generation

    def _forget(self, name: str, data: bytes | None) -> None:
        self._attempts.pop(name, None)
        if self._latest.get(name, b"") is data:
            self._latest.pop(name, None)
            self._failed.discard(name)
