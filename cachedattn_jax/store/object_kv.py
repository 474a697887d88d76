"""A TensorStore key-value store, with reads that go where their bytes are wanted.

Knows futures and bytes. Does not know what the objects are.
"""

from collections.abc import Callable
from typing import Any

import tensorstore as ts

from cachedattn_jax.store.buffers import Buffers, fill, num_bytes
from cachedattn_jax.store.open_file import OpenFile


class Later:
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


class ObjectKv:
    """Any store that TensorStore can open; results are futures."""

    def __init__(self, kv: ts.KvStore) -> None:
        self._kv = kv

    def list(self, *args: Any, **kwargs: Any) -> Any:
        return self._kv.list(*args, **kwargs)

    def read(self, key: str, **options: Any) -> Any:
        return self._kv.read(key, **options)

    def read_into(self, key: str, start: int, buffers: Buffers, file: OpenFile) -> Any:
        """Reads a range of bytes; how many there were, None for no such object."""
        byte_range = slice(start, start + num_bytes(buffers))
        found = self._kv.read(key, byte_range=byte_range)
        return Later(found, lambda found: put_found(found, buffers))

    def write(self, key: str, value: Buffers | None, **options: Any) -> Any:
        data = None if value is None else b"".join(value)
        return self._kv.write(key, data, **options)

    def close(self, timeout_s: float) -> None:
        """Nothing to be closed."""


def put_found(found: Any, buffers: Buffers) -> int | None:
    """Copies what was read to where it is wanted; how many bytes, None if missing."""
    return fill(buffers, found.value) if found.state == "value" else None
