"""A store that fails: seeded faults between the guard and the real thing.

Knows operations and dice. What is above cannot tell these faults from real ones.
"""

import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import tensorstore as ts

from cachedattn_jax.store.objects.buffers import Buffers, cut, num_bytes
from cachedattn_jax.store.objects.fault_config import (
    HOST_FAULTS,
    READ_FAULTS,
    WRITE_FAULTS,
    FaultConfig,
)

_ERRORS = {
    "error": "UNAVAILABLE: injected: input/output error",
    "permission": "PERMISSION_DENIED: injected: permission denied",
    "disk_full": "RESOURCE_EXHAUSTED: injected: no space left on device",
}


class Faults:
    """Decides what strikes; counts it by kind.

    Attributes:
        rate: share of operations that are struck from now on.
        injected: how often each kind struck.
        torn: names whose stored bytes are torn now.
        is_active: whether any does now; switched off, the store heals and all that
            hangs goes on.
    """

    def __init__(self, config: FaultConfig) -> None:
        self.config = config
        self.rate = config.rate
        self.injected: Counter[str] = Counter()
        self.torn: set[str] = set()
        self._random = random.Random(config.seed)
        self._lock = threading.Lock()
        self._healed = threading.Event()
        self._read_kinds = [k for k in config.kinds if k in READ_FAULTS]
        self._write_kinds = [k for k in config.kinds if k in WRITE_FAULTS]
        self._host_kinds = [k for k in config.kinds if k in HOST_FAULTS]

    @property
    def is_active(self) -> bool:
        return not self._healed.is_set()

    def heal(self) -> None:
        """No more faults; whatever hangs goes on."""
        self._healed.set()

    def strike_host(self) -> None:
        """Raises MemoryError where a copy from or to host memory shall fail."""
        if self.draw(self._host_kinds) is not None:
            raise MemoryError("injected: out of host memory")

    def draw_read(self) -> str | None:
        return self.draw(self._read_kinds)

    def draw_write(self) -> str | None:
        return self.draw(self._write_kinds)

    def draw(self, kinds: list[str]) -> str | None:
        """One of the kinds, or None for an operation that is spared."""
        if not kinds or not self.is_active:
            return None
        with self._lock:
            if self._random.random() >= self.rate:
                return None
            kind = self._random.choice(kinds)
            self.injected[kind] += 1
            return kind

    def spare(self, kind: str) -> None:
        """Takes a fault back that found nothing to strike."""
        with self._lock:
            self.injected[kind] -= 1

    def place(self, num_places: int) -> int:
        """Where in so many bytes a fault strikes."""
        with self._lock:
            return self._random.randrange(num_places)

    def delay(self, seconds: float, timeout_s: float | None) -> bool:
        """Waits so long; whether it did, and was not cut short by healing.

        Raises:
            TimeoutError: the caller's patience was over before.
        """
        limit_s = seconds if timeout_s is None else min(seconds, timeout_s)
        is_healed = self._healed.wait(limit_s)
        if not is_healed and timeout_s is not None and seconds > timeout_s:
            raise TimeoutError("injected")
        return not is_healed


class _Struck:
    """The future of an operation that a fault strikes when it is waited for."""

    def __init__(
        self,
        work: Callable[[float | None], Any],
        cancel: Callable[[], object] = lambda: None,
    ) -> None:
        self._work = work
        self._cancel = cancel

    def result(self, timeout: float | None = None) -> Any:
        return self._work(timeout)

    def cancel(self) -> None:
        self._cancel()


class FaultyKv:
    """A key-value store with faults; offers what TensorStore's does, as far as used."""

    def __init__(self, kv: Any, faults: Faults) -> None:
        self._kv = kv
        self._faults = faults

    def list(self, *args: Any, **kwargs: Any) -> Any:
        return self._kv.list(*args, **kwargs)

    def read(self, key: str, **kwargs: Any) -> Any:
        kind = self._faults.draw_read()
        if kind is None:
            return self._kv.read(key, **kwargs)
        return _Struck(lambda timeout: self._read(kind, key, timeout, kwargs))

    def read_parts(self, key: str, parts: Sequence[Buffers]) -> Sequence[Any]:
        # Drawn when they are waited for: nobody waits for those behind a bad one.
        reads = self._kv.read_parts(key, parts)
        return [
            _Struck(partial(self._read_part, read, buffers), read.cancel)
            for read, buffers in zip(reads, parts, strict=True)
        ]

    def rename(self, key: str, new_key: str) -> Any:
        def begin() -> Any:
            return self._kv.rename(key, new_key)

        kind = self._faults.draw_write()
        if kind == "torn_write":
            self._faults.spare(kind)
            kind = None
        if kind is None:
            return begin()
        return _Struck(lambda timeout: self._rename(kind, begin, timeout))

    def write(self, key: str, value: Buffers | None, **kwargs: Any) -> Any:
        kind = self._faults.draw_write()
        if kind == "torn_write" and value is None:
            self._faults.spare(kind)
            kind = None
        if kind is None:
            self._faults.torn.discard(key)
            return self._kv.write(key, value, **kwargs)
        return _Struck(lambda timeout: self._write(kind, key, value, timeout, kwargs))

    def _read(self, kind: str, key: str, timeout: float | None, kwargs: dict) -> Any:
        self._fail(kind, timeout)
        found = self._real(kind, timeout, lambda: self._kv.read(key, **kwargs))
        data = found.value
        if kind not in ("short_read", "bit_flip"):
            return found
        if not data:
            self._faults.spare(kind)
        elif kind == "short_read":
            data = data[: self._faults.place(len(data))]
        else:
            place = self._faults.place(8 * len(data))
            flipped = bytearray(data)
            flipped[place // 8] ^= 1 << place % 8
            data = bytes(flipped)
        return ts.KvStore.ReadResult(state=found.state, value=data, stamp=found.stamp)

    def _read_part(
        self, read: Any, buffers: Buffers, timeout: float | None
    ) -> int | None:
        kind = self._faults.draw_read()
        if kind is None:
            return read.result(timeout)
        self._fail(kind, timeout)
        size = self._real(kind, timeout, lambda: read)
        if kind not in ("short_read", "bit_flip"):
            return size
        if not size:
            self._faults.spare(kind)
        elif kind == "short_read":
            return self._faults.place(size)
        else:
            place = self._faults.place(8 * size)
            cut(buffers, place // 8)[0][0] ^= 1 << place % 8
        return size

    def _rename(
        self, kind: str, begin: Callable[[], Any], timeout: float | None
    ) -> Any:
        if kind == "hang" and self._faults.place(2):
            begin().result()
        self._fail(kind, timeout)
        return self._real(kind, timeout, begin)

    def _write(
        self,
        kind: str,
        key: str,
        value: Buffers | None,
        timeout: float | None,
        kwargs: dict,
    ) -> Any:
        if kind == "hang" and self._faults.place(2):
            # It is done, and nobody is told.
            self._kv.write(key, value, **kwargs).result()
            self._faults.torn.discard(key)
        self._fail(kind, timeout)
        if kind == "torn_write" and value:
            value = cut(value, 0, self._faults.place(num_bytes(value)))
        done = self._real(kind, timeout, lambda: self._kv.write(key, value, **kwargs))
        self._faults.torn.discard(key)
        if kind == "torn_write" and (done is None or done.generation):
            self._faults.torn.add(key)
        return done

    def _real(self, kind: str, timeout: float | None, start: Callable[[], Any]) -> Any:
        """The operation itself; where it fails by itself no fault has struck."""
        try:
            return start().result(timeout)
        except (ValueError, OSError):
            if kind not in ("latency", "hang"):
                self._faults.spare(kind)
            raise

    def _fail(self, kind: str, timeout: float | None) -> None:
        config = self._faults.config
        if kind in _ERRORS:
            raise ValueError(_ERRORS[kind])
        if kind == "hang" and not self._faults.delay(config.hang_s, timeout):
            self._faults.spare(kind)
        if kind == "latency":
            self._faults.delay(config.latency_s, timeout)
