"""Tells when device work is done without making anyone wait for it.

Knows arrays and moments. A watcher has a thread of its own and looks at one array after
the other, so there is one watcher for each thing that works in order: the compute
stream and each direction of copies.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor

import jax


class Watcher:
    """Waits for arrays in the order they are given."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"watch-{name}")

    def watch(self, arrays: object) -> "Future[float]":
        """When all arrays of a tree are ready, seconds of the monotonic clock.

        They must not be donated before; the future fails if their program did.
        """
        return self._thread.submit(_ready_s, arrays)

    def close(self) -> None:
        """Waits for what is watched and stops the thread."""
        self._thread.shutdown(wait=True)


def _ready_s(arrays: object) -> float:
    jax.block_until_ready(arrays)
    return time.monotonic()
