"""Which pages of a prompt are stored and can be read now.

Knows keys, tails and what is out of reach for a while. Does not know slots, or how a
page comes.
"""

import time
from collections import Counter
from collections.abc import Sequence

import numpy as np

from cachedattn_jax.store.disk_tier import DiskTier
from cachedattn_jax.store.page import PageKey, Tail
from cachedattn_jax.store.page_index import PageEntry, PageIndex, is_unclaimed


class Finder:
    """Finds stored pages for a turn.

    Attributes:
        tails: by session, the partly filled last page of its last finished turn.
    """

    def __init__(
        self,
        index: PageIndex,
        disk: DiskTier | None,
        page_tokens: int,
        counters: Counter[str],
    ) -> None:
        self.tails: dict[str, PageEntry] = {}
        self._index = index
        self._disk = disk
        self._page_tokens = page_tokens
        self._counters = counters

    def find(
        self,
        session: str,
        keys: Sequence[PageKey],
        tail: Tail | None,
        token_ids: np.ndarray | None = None,
    ) -> list[PageEntry]:
        """The longest stored beginning of a prompt that can be read now.

        Args:
            keys: the full pages of the prompt that may be reused, in order.
            tail: the session's last page, used if exactly the pages before it are
                found.
            token_ids: int32, of these pages; objects that hold others are refused.
        """
        found = []
        for index, key in enumerate(keys):
            entry = self._usable(key)
            if entry is None:
                break
            if entry.token_ids is None and token_ids is not None:
                step = self._page_tokens
                entry.token_ids = token_ids[index * step : (index + 1) * step].copy()
            found.append(entry)
        if tail is None or tail.index != len(found):
            return found
        entry = self._usable(tail.key)
        # A tail is written to in place, so it is never shared.
        if entry is not None and not entry.holds:
            if entry.session == session or is_unclaimed(entry.session):
                if entry.token_ids is None:
                    entry.token_ids = tail.token_ids.copy()
                self.tails[session] = entry
                found.append(entry)
        return found

    def _usable(self, key: PageKey) -> PageEntry | None:
        """A page that is somewhere, and not only where nothing can be read now."""
        entry = self._index.find(key)
        if entry is None or entry.slot is not None or entry.slab is not None:
            return entry
        if not entry.on_disk:
            return None
        if entry.arrival is None:
            assert self._disk is not None
            if not self._disk.can_be_read:
                self._counters["pages_passed_breaker_open"] += 1
                return None
            if entry.read_again_s > time.monotonic():
                self._counters["pages_passed_read_failed"] += 1
                return None
        return entry
