"""When to stop asking a store that does not answer. Knows failures and a clock.

closed --(failures in a row)--> open --(rest is over)--> trying
  ^                               ^                        |
  |                               +-------(failure)--------+
  +-------------(success)----------------------------------+
"""

import threading
import time
from collections.abc import Callable
from typing import Literal

State = Literal["closed", "open", "trying"]

# A tier that stays sick is asked ever less often, but not less often than this.
_LONGEST_REST = 8


class Breaker:
    """Counts failures of one kind of operation; safe to use from any thread.

    Args:
        max_failures: so many in a row open it.
        rest_s: how long nothing is tried then; doubles while trying fails, up to 8
            times as long.
    """

    def __init__(
        self,
        max_failures: int,
        rest_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_opened = 0
        self._max_failures = max_failures
        self._rest_s = rest_s
        self._clock = clock
        self._lock = threading.Lock()
        self._num_failures = 0
        self._num_rests = 0
        self._open_until: float | None = None

    @property
    def state(self) -> State:
        until = self._open_until
        if until is None:
            return "closed"
        return "open" if self._clock() < until else "trying"

    @property
    def is_open(self) -> bool:
        """Whether operations are not even tried now."""
        return self.state == "open"

    def succeeded(self) -> None:
        """An operation worked: all is well."""
        if self._open_until is None and not self._num_failures:
            return
        with self._lock:
            self._num_failures = self._num_rests = 0
            self._open_until = None

    def failed(self) -> None:
        """An operation failed in a way that says something about the whole store."""
        with self._lock:
            self._num_failures += 1
            if self._num_failures < self._max_failures or self.is_open:
                return
            rest_s = self._rest_s * min(2**self._num_rests, _LONGEST_REST)
            self._num_rests += 1
            self.num_opened += 1
            self._open_until = self._clock() + rest_s
