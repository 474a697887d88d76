"""Which pages lie in which tier, counted: what `store.page_index` does in virtual time.

Tells placement of every change. Does not know budgets or what moves pages.
"""

from collections import OrderedDict
from collections.abc import Hashable

from cachedattn_jax.simulator.pages import Pages
from cachedattn_jax.simulator.system import System
from cachedattn_jax.store.placement.placement import Placement
from cachedattn_jax.store.placement.tier import Tier


class SimulatedIndex:
    """Pages of all sessions of one replica.

    Attributes:
        num_device, num_host, num_disk: pages in a tier; on the device also those that
            running turns have still to write.
        copies: sessions with pages on disk that host memory holds too, the oldest
            first.
    """

    def __init__(self, system: System, placement: Placement) -> None:
        self.sessions: dict[Hashable, Pages] = {}
        self.num_device = self.num_host = self.num_disk = 0
        self.copies: OrderedDict[Pages, None] = OrderedDict()
        self._placement = placement
        self._page_bytes = system.page_bytes
        # A window's object is moved as what it holds, not as what it takes.
        is_window = system.allocation == "window"
        self._token_bytes = system.model.kv_bytes if is_window else None

    def find(self, session: int) -> Pages:
        """The pages of a session, none of which lie anywhere at first."""
        found = self.sessions.get(session)
        if found is None:
            found = self.sessions[session] = Pages(session)
        return found

    def num_bytes(self, pages: Pages, num: int) -> int:
        """Bytes that a copy of so many pages moves."""
        if self._token_bytes is not None:
            return num * pages.num_tokens * self._token_bytes
        return num * self._page_bytes

    def note(self, what: str, pages: Pages, num: int) -> None:
        """Keeps account of a move; see `Placement.moves`."""
        self._placement.moved(what, pages.session, num)

    def enter_device(self, pages: Pages, mask: int) -> None:
        self.num_device += (mask & ~pages.device).bit_count()
        pages.device |= mask
        self._resized(pages, Tier.DEVICE, pages.device)

    def enter_host(self, pages: Pages, mask: int) -> None:
        """Pages that host memory does not hold yet are there from now on."""
        pages.host |= mask
        self.num_host += mask.bit_count()
        self._resized(pages, Tier.HOST, pages.host)
        self._note_copies(pages)

    def enter_disk(self, pages: Pages, mask: int) -> None:
        """Pages that the disk does not hold yet are there from now on."""
        pages.disk |= mask
        self.num_disk += mask.bit_count()
        self._resized(pages, Tier.DISK, pages.disk)
        self._note_copies(pages)

    def leave_device(self, pages: Pages, mask: int) -> None:
        if mask:
            pages.device &= ~mask
            self.num_device -= mask.bit_count()
            self._resized(pages, Tier.DEVICE, pages.device)

    def leave_host(self, pages: Pages, mask: int) -> None:
        if mask:
            pages.host &= ~mask
            pages.arriving &= ~mask
            self.num_host -= mask.bit_count()
            self._resized(pages, Tier.HOST, pages.host)
            self._note_copies(pages)

    def leave_disk(self, pages: Pages, mask: int) -> None:
        if mask:
            pages.disk &= ~mask
            self.num_disk -= mask.bit_count()
            self._resized(pages, Tier.DISK, pages.disk)
            self._note_copies(pages)

    def _note_copies(self, pages: Pages) -> None:
        if pages.disk & pages.host:
            self.copies.setdefault(pages, None)
        elif pages in self.copies:
            del self.copies[pages]

    def _resized(self, pages: Pages, tier: Tier, mask: int) -> None:
        placement, size = self._placement, self._page_bytes
        placement.resized(pages.session, tier, mask.bit_count() * size)
        if pages.disk or tier is Tier.DISK:
            alone = pages.disk & ~(pages.host | pages.device)
            placement.on_disk_only(pages.session, alone.bit_count() * size)
