"""A TensorStore key-value store, with reads that go where their bytes are wanted.

Knows futures and bytes. Does not know what the objects are.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import tensorstore as ts

from cachedattn_jax.store.objects.buffers import Buffers, fill, num_bytes


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

    def read_parts(self, key: str, parts: Sequence[Buffers]) -> Sequence[Any]:
        """Reads the beginning of an object to where it is wanted, part by part.

        The result of each is how many bytes there were, None for no such object.
        """
        reads, start = [], 0
        for buffers in parts:
            stop = start + num_bytes(buffers)
            found = self._kv.read(key, byte_range=slice(start, stop))
            reads.append(Later(found, partial(put_found, buffers)))
            start = stop
        return reads

    def write(self, key: str, value: Buffers | None, **options: Any) -> Any:
        data = None if value is None else b"".join(value)
        return self._kv.write(key, data, **options)

    def close(self, timeout_s: float) -> None:
        """Nothing to be closed."""


def put_found(buffers: Buffers, found: Any) -> int | None:
    """Copies what was read to where it is wanted; how many bytes, None if missing."""
    return fill(buffers, found.value) if found.state == "value" else None
