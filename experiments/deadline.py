"""The time that a part of a run may take. Knows seconds, not what they are spent on."""

import math
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


class Deadline:
    """Ends loops over things to measure in time.

    Attributes:
        left_out: names of what was not begun any more.
    """

    def __init__(self, seconds: float = math.inf) -> None:
        self._end_s = time.monotonic() + seconds
        self.left_out: list[str] = []

    @property
    def left_s(self) -> float:
        """Seconds until it is over, 0 or more."""
        return max(0.0, self._end_s - time.monotonic())

    def over(self, items: Iterable[Item], what: str = "") -> Iterator[Item]:
        """The items, without those that would not end in time if each takes as long as
        the longest before it. The first is always there.
        """
        longest_s = 0.0
        for number, item in enumerate(items):
            if number and self.left_s <= longest_s:
                self.left_out.append(f"{what} {item}".strip())
                continue
            started = time.monotonic()
            yield item
            longest_s = max(longest_s, time.monotonic() - started)
