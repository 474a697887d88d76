"""Pages on their way from disk, a few layer groups at a time.

Knows parts and reasons. Does not know objects, or who waits.
"""

from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from cachedattn_jax.store.link import Copy
from cachedattn_jax.store.page import PageHeader

# Reasons that say something about the store now and nothing about the object.
PASSING = frozenset(
    (
        "timeout",
        "io_error",
        "permission",
        "disk_full",
        "breaker_open",
        "read_failed",
        "copy_failed",
    )
)


@dataclass(frozen=True, kw_only=True)
class DiskPart:
    """Some layer groups of pages that were read together.

    Attributes:
        groups: per layer group, [pages, layers_per_group, kv_heads, 2, page_tokens,
            dim]; unset where a page is bad.
        headers: of the pages, by index, without the bad ones.
        bad: reason by index of each page that is missing or may not be used.
        end_s: when the read ended, seconds of the monotonic clock.
    """

    groups: list[np.ndarray]
    headers: dict[int, PageHeader]
    bad: dict[int, str]
    end_s: float


@dataclass(frozen=True, kw_only=True)
class DiskRead:
    """Pages on their way from disk, a few layer groups at a time, in order.

    Attributes:
        num_rows: how many pages.
        groups_per_part: layer groups that are read together.
        copies: of the parts, one after the other.
    """

    num_rows: int
    groups_per_part: int
    parts: "list[Future[DiskPart]]"
    copies: list[Copy]

    def has_group(self, group: int) -> bool:
        """Whether a layer group is in host memory, or cannot come any more."""
        return self.copies[group // self.groups_per_part].has_arrived

    def wait(self, group: int, timeout_s: float | None) -> None:
        """Waits for a layer group, but not longer than this."""
        self.copies[group // self.groups_per_part].wait(timeout_s)

    def group(self, group: int) -> np.ndarray:
        """A layer group that is in host memory."""
        part, place = divmod(group, self.groups_per_part)
        return self.parts[part].result().groups[place]

    def bad(self) -> dict[int, str]:
        """Reason by index of every page found bad until now."""
        found: dict[int, str] = {}
        for part in self.parts:
            if part.done() and part.exception() is not None:
                found = {index: "read_failed" for index in range(self.num_rows)}
            elif part.done():
                found = {**part.result().bad, **found}
        return found
