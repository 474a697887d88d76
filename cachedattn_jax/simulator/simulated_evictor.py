"""Who leaves host memory and disk, as `store.evictor` and `victims` have it, in virtual
time.

Asks placement whose pages go and keeps the budgets. Does not know turns.
"""

from collections import Counter

from cachedattn_jax.simulator.pages import Pages, last_pages
from cachedattn_jax.simulator.simulated_index import SimulatedIndex
from cachedattn_jax.simulator.system import System
from cachedattn_jax.simulator.virtual_link import VirtualLinks
from cachedattn_jax.store.placement.placement import Placement
from cachedattn_jax.store.placement.tier import Tier


class SimulatedEvictor:
    """Room in host memory and on disk.

    Attributes:
        max_host, max_disk: budgets in pages.
    """

    def __init__(
        self,
        system: System,
        placement: Placement,
        index: SimulatedIndex,
        links: VirtualLinks,
        counters: Counter[str],
    ) -> None:
        self.max_host = system.host_bytes // system.page_bytes
        self.max_disk = system.disk_bytes // system.page_bytes
        self._placement = placement
        self._index = index
        self._links = links
        self._counters = counters
        self._host_bytes = system.host_bytes
        self._page_bytes = system.page_bytes
        self._is_whole = system.placement.granularity == "sessions"

    def num_leaving(self, mask: int, wanted: int) -> int:
        """How many of a session's pages leave a tier where so many have to."""
        held = mask.bit_count()
        return held if self._is_whole or held < wanted else wanted

    def make_host_room(self, num: int, now: float) -> bool:
        """Whether host memory takes so many pages now; some may be lost for that."""
        shortage = self._index.num_host + num - self.max_host
        return shortage <= 0 or self._demote(shortage, now)

    def keep_reserve(self, now: float) -> bool:
        """Whether pages left host memory so that its reserve is free."""
        if not self.max_disk:
            return False
        num_host = self._index.num_host
        wanted = self._placement.wanted_free_bytes(self._free_bytes)
        shortage = num_host + -(-wanted // self._page_bytes) - self.max_host
        if shortage <= 0 or not wanted:
            return False
        self._demote(shortage, now, for_reserve=True)
        # Refilled, if it is: the engine, which asks at every step, sees that too.
        self._placement.wanted_free_bytes(self._free_bytes)
        return self._index.num_host < num_host

    @property
    def _free_bytes(self) -> int:
        return self._host_bytes - self._index.num_host * self._page_bytes

    def shrink(self, pages: Pages, tier: Tier, num_bytes: int) -> None:
        """Gives up so many bytes of a session in a tier, from its end."""
        if pages.holds:
            return
        mask = pages.disk if tier is Tier.DISK else pages.host
        num = self.num_leaving(mask, -(-num_bytes // self._page_bytes))
        self._counters["pages_over_quota"] += num
        leave = self._index.leave_disk if tier is Tier.DISK else self._index.leave_host
        leave(pages, last_pages(mask, num))

    def write(self, pages: Pages, mask: int, now: float) -> bool:
        """Whether the disk took pages, for which others may have left it."""
        num = mask.bit_count()
        if not self._make_disk_room(num, now, pages):
            return False
        self._index.enter_disk(pages, mask)
        self._links.to_disk.carry(self._index.num_bytes(pages, num), now)
        return True

    def _demote(self, num: int, now: float, *, for_reserve: bool = False) -> bool:
        """Takes pages out of host memory, to disk where it has room.

        Args:
            for_reserve: nothing is lost, and the next turns keep theirs.
        """
        victims = []
        sessions = self._index.sessions
        for standing in self._placement.victims(
            Tier.HOST, now, spares_next=for_reserve
        ):
            pages = sessions[standing.session]
            if pages.holds:
                continue
            leaving = self.num_leaving(pages.host, num)
            victims.append((pages, leaving))
            num -= leaving
            if num <= 0:
                break
        for pages, leaving in victims:
            self._demote_pages(pages, leaving, now, may_lose=not for_reserve)
        return num <= 0

    def _demote_pages(
        self, pages: Pages, num: int, now: float, *, may_lose: bool
    ) -> None:
        mask = last_pages(pages.host, num)
        dirty = mask & ~pages.disk
        if dirty:
            if self.write(pages, dirty, now):
                self._counters["pages_demoted"] += dirty.bit_count()
            elif not may_lose:
                return
        lost = mask & ~(pages.disk | pages.device)
        self._counters["pages_lost_from_host"] += lost.bit_count()
        self._index.note("demote", pages, num)
        self._index.leave_host(pages, mask)

    def _make_disk_room(self, num: int, now: float, writing: Pages) -> bool:
        """Whether the disk takes pages of a session now, whose others stay there."""
        shortage = self._index.num_disk + num - self.max_disk
        if shortage <= 0:
            return True
        if num > self.max_disk:
            return False
        # What host memory holds too is lost least.
        copies, shortage = self._copies(shortage, writing)
        alone, shortage = self._alone(shortage, now, writing)
        if shortage > 0:
            return False
        for pages, leaving in copies:
            self._index.leave_disk(pages, leaving)
        for pages, leaving in alone:
            if leaving:
                lost = leaving & ~pages.device
                self._counters["pages_lost_from_disk"] += lost.bit_count()
                self._index.note("drop", pages, leaving.bit_count())
                self._index.leave_disk(pages, leaving)
        return True

    def _copies(
        self, shortage: int, writing: Pages
    ) -> tuple[list[tuple[Pages, int]], int]:
        """Pages to drop that host memory holds too, and how many are missing still."""
        chosen = []
        for pages in self._index.copies:
            if shortage <= 0:
                break
            if pages is not writing:
                leaving = last_pages(pages.disk & pages.host, shortage)
                chosen.append((pages, leaving))
                shortage -= leaving.bit_count()
        return chosen, shortage

    def _alone(
        self, shortage: int, now: float, writing: Pages
    ) -> tuple[list[tuple[Pages, int]], int]:
        """Pages to drop that only the disk has, and how many are missing still."""
        chosen: list[tuple[Pages, int]] = []
        if shortage <= 0:
            return chosen, shortage
        sessions = self._index.sessions
        for standing in self._placement.victims(Tier.DISK, now):
            pages = sessions[standing.session]
            if pages.holds or pages is writing:
                continue
            alone = pages.disk & ~pages.host
            leaving = last_pages(alone, self.num_leaving(alone, shortage))
            chosen.append((pages, leaving))
            shortage -= leaving.bit_count()
            if shortage <= 0:
                break
        return chosen, shortage
