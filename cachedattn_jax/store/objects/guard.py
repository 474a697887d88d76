"""A key-value store whose operations end: in time, or as a failure with a reason.

Knows time-outs, breakers and counters. Does not know what the objects are.
"""

import errno
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import tensorstore as ts

from cachedattn_jax.store.objects.breaker import Breaker
from cachedattn_jax.store.objects.buffers import Buffers
from cachedattn_jax.store.objects.io_config import IoConfig

# Listing reads whole folders; it is done at start-up and by people.
_LIST_PATIENCE = 30
# Operations count as slow from this share of the time-out on.
_SLOW = 0.05

# Status of TensorStore, and the reason that counters show. Order matters.
_REASONS = (
    ("OUT_OF_RANGE", "torn"),
    ("PERMISSION_DENIED", "permission"),
    ("RESOURCE_EXHAUSTED", "disk_full"),
)
_ERRNO_REASONS = {
    errno.EACCES: "permission",
    errno.EPERM: "permission",
    errno.EROFS: "permission",
    errno.ENOSPC: "disk_full",
    errno.EDQUOT: "disk_full",
}


class StorageFailure(Exception):
    """An operation that did not work; `reason` is a word for counters."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class Operation:
    """An operation under way; `result` waits for it, at most until its time is over."""

    def __init__(
        self, guard: "Guard", name: str, breaker: Breaker, start: Callable[[], Any]
    ) -> None:
        self._guard = guard
        self._name = name
        self._breaker = breaker
        self._started_s = time.monotonic()
        self._failure: StorageFailure | None = None
        self._future: Any = None
        if breaker.is_open:
            self._failure = StorageFailure("breaker_open")
            return
        try:
            self._future = start()
        except (ValueError, OSError) as error:
            self._failure = self._failed(error)

    def result(self) -> Any:
        """What came of it.

        Raises:
            StorageFailure: it failed, took too long, or was not tried.
        """
        if self._failure is None:
            try:
                left_s = self._started_s + self._guard.timeout_s - time.monotonic()
                found = self._future.result(max(0.0, left_s))
            except (ValueError, OSError) as error:  # TimeoutError is an OSError
                self._failure = self._failed(error)
        self._guard.note(self._name, self._started_s, self._failure)
        if self._failure is not None:
            raise self._failure
        self._breaker.succeeded()
        return found

    def cancel(self) -> None:
        """Nobody waits for it any more; it may be done all the same."""
        if self._future is not None:
            self._future.cancel()

    def _failed(self, error: Exception) -> StorageFailure:
        if isinstance(error, TimeoutError):
            self.cancel()
            failure = StorageFailure("timeout", f"{self._guard.timeout_s} s")
        else:
            text = str(error).strip().splitlines()[0] if str(error) else ""
            failure = StorageFailure(_reason(error, text), text)
        if failure.reason == "torn":  # the store is well, the object is not
            self._breaker.succeeded()
        else:
            self._breaker.failed()
        return failure


class Guard:
    """Reads, writes and lists under time-outs and two breakers.

    Attributes:
        counters: operations, failures by reason, microseconds and bytes.
        reading, writing: the breakers.
    """

    def __init__(
        self, kv: Any, *, timeout_s: float, reading: Breaker, writing: Breaker
    ) -> None:
        self.timeout_s = timeout_s
        self.reading = reading
        self.writing = writing
        self.counters: Counter[str] = Counter()
        self._kv = kv
        self._lock = threading.Lock()

    def read(
        self,
        key: str,
        byte_range: slice | None = None,
        if_not_equal: bytes | None = None,
    ) -> Operation:
        """Starts to read an object, or a part of it."""
        options: dict[str, Any] = {}
        if byte_range is not None:
            options["byte_range"] = byte_range
        if if_not_equal is not None:
            options["if_not_equal"] = if_not_equal
        return Operation(
            self, "read", self.reading, lambda: self._kv.read(key, **options)
        )

    def read_parts(self, key: str, parts: Sequence[Buffers]) -> Sequence[Operation]:
        """Starts to read the beginning of an object to where it is wanted.

        Args:
            parts: the memory for each, one after the other. After a failure it may
                still be written to.

        Returns:
            An operation for each part, in order; its result is how many bytes there
            were, None if there is no such object.
        """
        begun: list[Any] = []

        def begin(index: int) -> Any:
            if not begun:
                begun.extend(self._kv.read_parts(key, parts))
            return begun[index]

        return [
            Operation(self, "read", self.reading, partial(begin, index))
            for index in range(len(parts))
        ]

    def write(
        self, key: str, value: Buffers | None, if_equal: bytes | None = None
    ) -> Operation:
        """Starts to write an object whole, or with None to delete it.

        Args:
            value: its bytes, in pieces; they must not change any more.
            if_equal: only if the object is of this generation still.
        """
        options = {} if if_equal is None else {"if_equal": if_equal}
        return Operation(
            self, "write", self.writing, lambda: self._kv.write(key, value, **options)
        )

    def rename(self, key: str, new_key: str) -> Operation:
        """Starts to give an object of a local folder another name."""
        return Operation(
            self, "write", self.writing, lambda: self._kv.rename(key, new_key)
        )

    def list(self, prefix: str) -> Iterable[str]:
        """Names under a folder, without the folder; reads no object.

        Raises:
            StorageFailure: they cannot be listed.
        """
        # "0" is the character after "/".
        keys = ts.KvStore.KeyRange(prefix, prefix.removesuffix("/") + "0")
        try:
            names = self._kv.list(keys, strip_prefix_length=len(prefix)).result(
                _LIST_PATIENCE * self.timeout_s
            )
        except (ValueError, OSError) as error:
            raise StorageFailure("list_failed", str(error)) from error
        return (name.decode() for name in names)

    def count(self, name: str) -> None:
        """Counts an event; from any thread."""
        with self._lock:
            self.counters[name] += 1

    def note(self, name: str, started_s: float, failure: StorageFailure | None) -> None:
        """Counts an operation that has ended."""
        taken_us = int(1e6 * (time.monotonic() - started_s))
        with self._lock:
            self.counters[f"{name}_operations"] += 1
            self.counters[f"{name}_us"] += taken_us
            if taken_us > 1e6 * _SLOW * self.timeout_s:
                self.counters[f"{name}_slow"] += 1
            if failure is not None:
                self.counters[f"{name}_failed_{failure.reason}"] += 1


def _reason(error: Exception, text: str) -> str:
    if isinstance(error, OSError) and error.errno in _ERRNO_REASONS:
        return _ERRNO_REASONS[error.errno]
    return next((reason for status, reason in _REASONS if status in text), "io_error")


def guarded(kv: Any, io: IoConfig) -> Guard:
    """A store under the time-out and with the breakers of a configuration."""
    reading, writing = (
        Breaker(io.breaker_failures, io.breaker_rest_s) for _ in range(2)
    )
    return Guard(kv, timeout_s=io.timeout_s, reading=reading, writing=writing)
