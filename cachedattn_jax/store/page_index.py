"""Which pages exist, where their copies are and whose they are.

Knows keys, tiers and sessions. Does not move anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from cachedattn_jax.store.disk_read import DiskRead
from cachedattn_jax.store.host_tier import Slab
from cachedattn_jax.store.page import PageKey
from cachedattn_jax.store.placement.placement import Placement
from cachedattn_jax.store.placement.tier import TIERS, Tier

# To look a member up in its enum takes longer than all that `nearest` does.
_DEVICE, _HOST, _DISK = TIERS


def unclaimed(tenant: str) -> str:
    """Owner of a tenant's pages found on disk until a session uses them: first to go.

    Args:
        tenant: its quoted name; no session has an empty one.
    """
    return f"{tenant}/"


def is_unclaimed(session: str) -> bool:
    """Whether no session has used its pages since the start."""
    return session.endswith("/")


def tenant_of(session: str) -> str:
    """The quoted tenant of a session."""
    return session.partition("/")[0]


@runtime_checkable
class Arrival(Protocol):
    """A read that brings a run of pages from disk to host memory."""

    @property
    def entries(self) -> list[PageEntry]: ...

    @property
    def read(self) -> DiskRead: ...


@dataclass(eq=False, kw_only=True)
class PageEntry:
    """One page, in any number of tiers.

    Attributes:
        session: who used it last and therefore answers for its place.
        token_ids: int32, the tokens it holds; None for one found on disk and not yet
            used.
        slot: its place on the device.
        slab, row: its place in host memory.
        on_disk: whether a complete object exists.
        arrival: the read that brings it from disk to host memory, if one does.
        is_writing: whether an object is being written.
        is_saving: whether it was taken out of its slot, which it may still have, and
            waits to be copied to host memory.
        write_again_s, read_again_s: when to try again after writing or reading it
            failed, seconds of the monotonic clock.
        holds: running turns that use it; a held page stays where it is.
    """

    key: PageKey
    session: str
    token_ids: np.ndarray | None
    slot: int | None = None
    slab: Slab | None = None
    row: int = 0
    on_disk: bool = False
    arrival: Arrival | None = None
    is_writing: bool = False
    is_saving: bool = False
    write_again_s: float = 0.0
    read_again_s: float = 0.0
    holds: int = 0

    @property
    def nearest(self) -> Tier | None:
        """The fastest tier it is in; None if it is nowhere yet."""
        # Asked for every page of a history, so no loop over tiers: that took 3 us.
        if self.slot is not None:
            return _DEVICE
        if self.slab is not None:
            return _HOST
        return _DISK if self.on_disk else None

    @property
    def is_saved(self) -> bool:
        """Whether it outlives its slot, or will when what is under way has ended."""
        return (
            self.slab is not None or self.on_disk or self.is_writing or self.is_saving
        )

    @property
    def is_lost(self) -> bool:
        """Whether it is nowhere, and on its way nowhere."""
        return self.slot is None and not self.is_saved

    @property
    def is_on_disk_only(self) -> bool:
        """Whether it is in no faster tier, nor on its way to one."""
        is_near = self.slot is not None or self.slab is not None or self.arrival
        return self.on_disk and not is_near

    @property
    def tiers(self) -> list[Tier]:
        is_in = (self.slot is not None, self.slab is not None, self.on_disk)
        return [tier for tier, is_there in zip(TIERS, is_in, strict=True) if is_there]


class PageIndex:
    """All pages by key, and by session for each tier.

    Args:
        placement: is told how many bytes each session has in each tier.
    """

    def __init__(self, placement: Placement, page_bytes: int) -> None:
        self.placement = placement
        self._page_bytes = page_bytes
        self._on_disk_only: dict[str, set[PageKey]] = {}
        self._copies: dict[PageKey, PageEntry] = {}
        self._pages: dict[PageKey, PageEntry] = {}
        self._by_session: dict[Tier, dict[str, dict[PageKey, PageEntry]]] = {
            tier: {} for tier in Tier
        }

    def __len__(self) -> int:
        return len(self._pages)

    def find(self, key: PageKey) -> PageEntry | None:
        return self._pages.get(key)

    def add(
        self, key: PageKey, session: str, token_ids: np.ndarray | None
    ) -> PageEntry:
        """A new page, in no tier yet."""
        entry = PageEntry(key=key, session=session, token_ids=token_ids)
        self._pages[key] = entry
        return entry

    def place(self, entry: PageEntry, tier: Tier) -> None:
        """Notes that the page, whose fields say so already, is in the tier."""
        pages = self._by_session[tier].setdefault(entry.session, {})
        pages[entry.key] = entry
        self._resized(entry.session, tier, len(pages))
        self.note(entry)

    def unplace(self, entry: PageEntry, tier: Tier) -> None:
        """Notes that the page has left the tier; forgets it if that was the last."""
        self._take_out(entry, tier)
        self.note(entry)
        if entry.is_lost:
            self.remove(entry)

    def remove(self, entry: PageEntry) -> None:
        """Makes the page, which is in no tier any more, impossible to find."""
        if self._pages.get(entry.key) is entry:
            del self._pages[entry.key]

    def touch(self, entry: PageEntry, session: str) -> None:
        """Notes a use of the page by a session, which answers for it from now on."""
        if entry.session == session:
            return
        tiers = entry.tiers
        for tier in tiers:
            self._take_out(entry, tier)
        self._note_on_disk_only(entry, False)
        entry.session = session
        for tier in tiers:
            self.place(entry, tier)

    def note(self, entry: PageEntry) -> None:
        """Notes what follows from the tiers that the page is in."""
        self._note_on_disk_only(entry, entry.is_on_disk_only)
        if entry.on_disk and entry.slab is not None:
            self._copies[entry.key] = entry
        else:
            self._copies.pop(entry.key, None)

    def copies(self) -> Iterator[PageEntry]:
        """Pages on disk that host memory holds too, the oldest of them first."""
        yield from self._copies.values()

    def on_disk_only(self, session: str) -> list[PageEntry]:
        """A session's pages on disk that are in no faster tier, in order."""
        keys = self._on_disk_only.get(session, ())
        pages = self._by_session[Tier.DISK].get(session, {})
        return [entry for key, entry in pages.items() if key in keys]

    def last_pages_first(self, session: str, tier: Tier) -> Iterator[PageEntry]:
        """A session's pages in a tier, from the end of the conversation."""
        return reversed(self._by_session[tier].get(session, {}).values())

    def _take_out(self, entry: PageEntry, tier: Tier) -> None:
        pages = self._by_session[tier][entry.session]
        del pages[entry.key]
        if not pages:
            del self._by_session[tier][entry.session]
        self._resized(entry.session, tier, len(pages))

    def _resized(self, session: str, tier: Tier, num_pages: int) -> None:
        self.placement.resized(session, tier, num_pages * self._page_bytes)

    def _note_on_disk_only(self, entry: PageEntry, is_so: bool) -> None:
        keys = self._on_disk_only.get(entry.session)
        if (keys is not None and entry.key in keys) == is_so:
            return
        if keys is None:
            keys = self._on_disk_only[entry.session] = set()
        (keys.add if is_so else keys.discard)(entry.key)
        num_bytes = len(keys) * self._page_bytes
        if not keys:
            del self._on_disk_only[entry.session]
        self.placement.on_disk_only(entry.session, num_bytes)

    def in_tier(self, tier: Tier) -> Iterator[PageEntry]:
        """Every page in a tier, session by session."""
        for pages in self._by_session[tier].values():
            yield from pages.values()
