"""What turns hold: leases stored pages with slots, publishes new ones.

Knows pages, slots and holds. Does not know how pages are found, when they are saved or
evicted, or what is in them.
"""

import urllib.parse
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from cachedattn_jax.store.device_pool import DevicePool, split_runs
from cachedattn_jax.store.disk_tier import DiskTier
from cachedattn_jax.store.evictor import Evictor
from cachedattn_jax.store.exits import Exits
from cachedattn_jax.store.inbound import Inbound, Load
from cachedattn_jax.store.lease import Lease, tokens_by_tier
from cachedattn_jax.store.link import Copy, Links
from cachedattn_jax.store.page import PageKey, Tail
from cachedattn_jax.store.page_index import (
    PageEntry,
    PageIndex,
    tenant_of,
    unclaimed,
)
from cachedattn_jax.store.placement.tier import Tier
from cachedattn_jax.store.saver import Saver
from cachedattn_jax.store.watcher import Watcher


class Leases:
    """Leases of the pages of one store."""

    def __init__(
        self,
        index: PageIndex,
        pool: DevicePool,
        disk: DiskTier | None,
        evictor: Evictor,
        exits: Exits,
        saver: Saver,
        links: Links,
        watcher: Watcher,
        counters: Counter[str],
    ) -> None:
        self._index = index
        self._pool = pool
        self._disk = disk
        self._evictor = evictor
        self._exits = exits
        self._saver = saver
        self._links = links
        self._watcher = watcher
        self._counters = counters

    def acquire(
        self,
        session: str,
        found: Sequence[PageEntry],
        tail: Tail | None,
        num_pages: int,
    ) -> Lease | None:
        """Holds pages that were just found, and slots for the rest of a turn.

        Args:
            found: what `Finder.find` gave, or its beginning.
            tail: the same as there.
            num_pages: pages the turn may grow to.

        Returns:
            None when the slots it needs are held by running turns.
        """
        for entry in found:
            entry.holds += 1
        there = [entry.slot for entry in found]
        num_new = num_pages - len(there) + there.count(None)
        if not self._free_slots(num_new):
            for entry in found:
                entry.holds -= 1
            return None
        new_slots = iter(self._pool.take(num_new))
        entries = [*found, *[None] * (num_pages - len(found))]
        slots = [next(new_slots) if slot is None else slot for slot in there]
        slots += new_slots
        tokens_from = tokens_by_tier(found, tail, self._pool.layout.page_tokens)
        lease = Lease(
            session=session,
            slots=np.asarray(slots, np.int32),
            entries=entries,
            cached_tokens=sum(tokens_from.values()),
            tokens_from=tokens_from,
            inbound=Inbound(
                self._loads(found, slots),
                self._pool,
                self._links.host_to_device,
                self._watcher,
            ),
        )
        for entry in found:
            self._index.touch(entry, session)
        return lease

    def forget_bad(self, lease: Lease) -> bool:
        """Forgets pages that turned out bad on arrival; whether there were any.

        Such a lease is to be released, and what is left of its pages acquired anew.
        """
        inbound = lease.inbound
        if not inbound.has_failed:
            return False
        bad = inbound.bad()
        if not bad:  # it was a copy: what it carried is computed again
            lost = [e for e in lease.entries if e is not None and e.slot is None]
            bad = {"copy_failed": lost}
        for reason, entries in bad.items():
            self._counters[f"miss_{reason}"] += len(entries)
            for entry in entries:
                if reason == "copy_failed":
                    self._exits.leave_host(entry)
                self._evictor.give_up_object(entry, reason)
        return True

    def publish(
        self,
        lease: Lease,
        pages: Iterable[tuple[int, PageKey, np.ndarray]],
    ) -> None:
        """Makes pages of a turn findable by other turns.

        Only after the programs that fill them were dispatched: later ones read them.

        Args:
            pages: place in the lease, key and tokens of each.
        """
        for index, key, token_ids in pages:
            self.publish_page(lease, index, key, token_ids)

    def drop(self, lease: Lease, pages: range) -> bool:
        """Takes pages out of a lease; their slots become those of its last pages.

        Returns:
            False if running turns hold the slots that are needed instead of shared
            ones; nothing has changed then.
        """
        if not self.own(lease, pages):
            return False
        slots, (start, stop) = lease.slots, (pages.start, pages.stop)
        order = [slots[:start], slots[stop:], slots[start:stop]]
        lease.slots = np.concatenate(order)
        entries = lease.entries
        lease.entries = entries[:start] + entries[stop:] + entries[start:stop]
        return True

    def can_own(self, lease: Lease) -> bool:
        """Whether there are slots in place of all that a lease shares."""
        held = zip(lease.entries, lease.slots.tolist(), strict=True)
        num_shared = sum(
            entry is not None and entry.slot == slot and entry.holds > 1
            for entry, slot in held
        )
        return self._free_slots(num_shared)

    def own(self, lease: Lease, pages: range) -> bool:
        """Makes slots of a lease the turn's alone: what they hold is found no more.

        Returns:
            False as in `drop`.
        """
        held = [(i, e) for i in pages if (e := lease.entries[i]) is not None]
        slots = lease.slots
        shared = [i for i, e in held if e.slot == slots[i] and e.holds > 1]
        if not self._free_slots(len(shared)):
            return False
        new_slots = iter(self._pool.take(len(shared)))
        # Nobody may come back for them: wherever else they are, they go first.
        tenant = tenant_of(lease.session)
        owner = unclaimed(tenant)
        self._index.placement.known(owner, urllib.parse.unquote(tenant))
        for index, entry in held:
            lease.entries[index] = None
            self._index.touch(entry, owner)
            if entry.slot != slots[index]:  # it was copied to a slot of the turn's own
                entry.holds -= 1
            elif entry.holds > 1:
                lease.dropped.append(entry)
                slots[index] = next(new_slots)
            else:
                entry.holds -= 1
                self._exits.leave_device(entry)
        self._index.placement.closed(owner)
        return True

    def release(self, lease: Lease) -> None:
        """Ends the hold on pages and slots, whatever became of the turn."""
        for slot, entry in zip(lease.slots.tolist(), lease.entries, strict=True):
            if entry is not None:
                entry.holds -= 1
            if entry is None or entry.slot != slot:
                self._pool.give_back(slot)
        self.forget_dropped(lease)
        self._note(lease.inbound.reads, "disk_to_host")
        self._note(lease.inbound.puts, "host_to_device")
        lease.entries = []
        lease.slots = lease.slots[:0]

    def forget_dropped(self, lease: Lease) -> None:
        """Ends the hold on dropped pages, once all that reads them was dispatched."""
        for entry in lease.dropped:
            entry.holds -= 1
        lease.dropped = []

    def abandon(self, lease: Lease) -> None:
        """Releases a lease whose pages are of no use; they lose their slots."""
        entries = lease.entries
        self.release(lease)
        for entry in filter(None, entries):
            if entry.slot is not None and not entry.holds:
                self._pool.give_back(self._exits.leave_device(entry))

    def _note(self, copies: Sequence[Copy], direction: str) -> None:
        for copy in copies:
            if copy.is_good and copy.has_arrived:
                start_s, end_s = copy.span
                self._counters[f"bytes_{direction}"] += copy.num_bytes
                self._counters[f"us_{direction}"] += int(1e6 * (end_s - start_s))

    def _free_slots(self, num_slots: int) -> bool:
        """Whether so many slots are free now; evicts nothing if that is not enough."""
        victims = self._evictor.slot_victims(num_slots)
        if victims is None:
            return False
        self._saver.save_now(victims)
        self._evictor.free_slots(victims)
        return True

    def _loads(self, found: Sequence[PageEntry], slots: list[int]) -> list[Load]:
        loads: dict[int, Load] = {}
        from_disk, load = [], None
        for slot, entry in zip(slots, found, strict=False):
            if entry.slot is not None:
                continue
            if load is not None and load.source is entry.slab:
                load.slots[entry.row] = slot  # of the same run as the page before
                continue
            source, entries, row = entry.slab, [], entry.row
            if source is None and entry.arrival is not None:
                # It is being read already.
                source, entries = entry.arrival.read, entry.arrival.entries
                row = entries.index(entry)
            if source is None:
                from_disk.append((slot, entry))
                continue
            load = loads.get(id(source))
            if load is None:
                unused = np.full(source.num_rows, self._pool.num_slots, np.int32)
                load = Load(slots=unused, source=source, entries=entries)
                loads[id(source)] = load
            load.slots[row] = slot
        return [*loads.values(), *self._disk_loads(from_disk)]

    def _disk_loads(self, pages: list[tuple[int, PageEntry]]) -> Iterator[Load]:
        for run in split_runs(pages):
            assert self._disk is not None
            entries = [entry for _, entry in run]
            yield Load(
                slots=np.asarray([slot for slot, _ in run], np.int32),
                source=self._disk.read(entries),
                entries=entries,
            )
            self._counters["pages_read"] += len(run)

    def publish_page(
        self, lease: Lease, index: int, key: PageKey, token_ids: np.ndarray
    ) -> None:
        """Makes one page of a turn, full or a tail, findable by other turns."""
        slot, entry = int(lease.slots[index]), lease.entries[index]
        if entry is not None and entry.key != key:  # a tail that has grown
            if entry.slot is not None:
                self._exits.leave_device(entry)
            entry.holds -= 1
            lease.entries[index] = entry = None
        if entry is None:
            entry = self._index.find(key)
            if entry is not None and entry.slot is not None:
                return  # another turn computed the same page first
            if entry is None:
                entry = self._index.add(key, lease.session, token_ids.copy())
            entry.holds += 1
            lease.entries[index] = entry
        if entry.token_ids is None:
            entry.token_ids = token_ids.copy()
        if entry.slot is None:
            entry.slot = slot
            self._index.place(entry, Tier.DEVICE)
