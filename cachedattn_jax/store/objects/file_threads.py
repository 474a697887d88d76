"""Threads that wait for a file system.

Knows calls and futures. Does not know files.

A system call cannot be cut short. So whoever waits for one here waits for its future,
with a time-out, and a thread whose call hangs holds up neither `close` for longer than
it is told nor the end of the process.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any


class Call(Future[Any]):
    """The result of a call; `is_void` once nobody waits for it any more."""

    is_void = False

    def cancel(self) -> bool:
        self.is_void = True
        return super().cancel()


_Queue = SimpleQueue[tuple[Call, Callable[..., Any], tuple[object, ...]] | None]


class FileThreads:
    """So many threads at most; they start when there is something to do."""

    def __init__(self, max_threads: int, name: str) -> None:
        self._max_threads = max_threads
        self._name = name
        self._queue: _Queue = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    def submit(self, work: Callable[..., Any], *args: object) -> Call:
        """Calls `work(call, *args)` on a thread; `call` is what is returned here."""
        call = Call()
        self._queue.put((call, work, args))
        if len(self._threads) < self._max_threads:
            self._start_one()
        return call

    def close(self, timeout_s: float) -> None:
        """Lets the threads end; waits for them, but not longer than this."""
        end_s = time.monotonic() + timeout_s
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(max(0.0, end_s - time.monotonic()))

    def _start_one(self) -> None:
        with self._lock:
            number = len(self._threads)
            if number == self._max_threads:
                return
            thread = threading.Thread(
                target=_serve,
                args=(self._queue,),
                name=f"{self._name}_{number}",
                daemon=True,
            )
            self._threads.append(thread)
        thread.start()

    def __del__(self) -> None:
        # Whoever nobody closed is gone, and so are its threads.
        for _ in self._threads:
            self._queue.put(None)


def _serve(queue: _Queue) -> None:
    while (item := queue.get()) is not None:
        call, work, args = item
        if call.set_running_or_notify_cancel():
            try:
                result = work(call, *args)
            except BaseException as error:
                call.set_exception(error)
            else:
                call.set_result(result)
        # Arguments are large, and the next call may be long in coming.
        del item, call, work, args
