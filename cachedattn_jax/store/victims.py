"""Which pages leave a tier next: those of the sessions that the policy names first.

Knows holds, and whether sessions leave as a whole. Does not move anything, and does not
know budgets.
"""

import time
from itertools import islice

from cachedattn_jax.store.page_index import PageEntry, PageIndex
from cachedattn_jax.store.placement.tier import Tier


class Victims:
    """Chooses pages of the sessions that give up a tier."""

    def __init__(self, index: PageIndex) -> None:
        self._index = index
        self._placement = index.placement

    @property
    def are_whole(self) -> bool:
        """Whether sessions leave a tier as a whole."""
        return self._placement.config.granularity == "sessions"

    def units(
        self, tier: Tier, num_pages: int, *, spares_next: bool = False, but: str = ""
    ) -> list[list[PageEntry]]:
        """The next pages to leave a tier, in units that leave together.

        Args:
            num_pages: how many at least, if there are so many.
            spares_next: see `Placement.victims`.
            but: a session that stays.
        """
        units: list[list[PageEntry]] = []
        if num_pages <= 0:
            return units
        now, left = time.monotonic(), num_pages
        for standing in self._placement.victims(tier, now, spares_next=spares_next):
            session = str(standing.session)
            if session == but:
                continue
            pages = self._index.last_pages_first(session, tier)
            free = (e for e in pages if not e.holds and _is_only(e, tier))
            chosen = (
                [list(free)] if self.are_whole else [[e] for e in islice(free, left)]
            )
            units += filter(None, chosen)
            left -= sum(map(len, chosen))
            if left <= 0:
                break
        return units


def _is_only(entry: PageEntry, tier: Tier) -> bool:
    """On disk pages go that host memory does not hold, nor awaits."""
    return tier is not Tier.DISK or (entry.slab is None and entry.arrival is None)
