"""The three tiers as one store: finds, loads, saves, demotes and drops pages.

Knows where every page is and which budget it counts against. Does not know requests,
positions or models. All calls come from the engine thread; worker threads only move
bytes.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

import jax
import numpy as np

from cachedattn_jax.store.budget import StoreConfig
from cachedattn_jax.store.catalog import Catalog, SessionRecord, session_key
from cachedattn_jax.store.device_pool import DevicePool, split_runs
from cachedattn_jax.store.disk_tier import DiskTier
from cachedattn_jax.store.evictor import Evictor
from cachedattn_jax.store.host_tier import HostTier
from cachedattn_jax.store.inbound import Inbound, Load
from cachedattn_jax.store.layout import Layout
from cachedattn_jax.store.lease import Lease
from cachedattn_jax.store.link import Links
from cachedattn_jax.store.page import PageKey, Tail
from cachedattn_jax.store.page_index import PageEntry, PageIndex
from cachedattn_jax.store.placement import QueueView, Tier, policy
from cachedattn_jax.store.root import Root
from cachedattn_jax.store.saver import Saver
from cachedattn_jax.store.watcher import Watcher
from cachedattn_jax.timeline import Timeline

# Owner of pages found on disk at start-up until a session uses them: first to go.
_UNCLAIMED = ""


class TieredStore:
    """Pages of all sessions in device, host and disk memory under three budgets.

    Attributes:
        watchers: of the compute stream and of both directions of copies, by name.
    """

    def __init__(
        self,
        layout: Layout,
        config: StoreConfig,
        device: jax.Device,
        timeline: Timeline | None = None,
    ) -> None:
        self.layout = layout
        self.config = config
        self.timeline = timeline or Timeline()
        self.links = Links(config.host_device_link, config.disk_host_link)
        self.watchers = {
            name: Watcher(name)
            for name in ("compute", "host-to-device", "device-to-host")
        }
        self.pool = DevicePool(layout, config.num_slots(layout), device)
        self.host = HostTier(config.num_host_bytes)
        self.root = Root(config.disk_root, layout) if config.disk_root else None
        self.disk = self._open_disk()
        self.catalog = Catalog(self.root)
        self.index = PageIndex(policy(config.policy))
        self.counters: Counter[str] = Counter()
        self._evictor = Evictor(
            self.index, self.pool, self.host, self.disk, self.timeline, self.counters
        )
        self.saver = Saver(
            self.index,
            self.pool,
            self.host,
            self._evictor,
            self.links,
            self.watchers,
            self.timeline,
            self.counters,
            config.num_write_buffer_bytes,
        )
        self._tails: dict[str, PageEntry] = {}
        for key in self.disk.list() if self.disk else ():
            entry = self.index.add(key, _UNCLAIMED, None)
            entry.on_disk = True
            self.index.place(entry, Tier.DISK, time.monotonic())

    def _open_disk(self) -> DiskTier | None:
        num_bytes = self.config.num_disk_bytes
        if num_bytes and self.root is None:
            raise ValueError(f"disk_bytes={num_bytes} needs a disk_root to write to")
        if not num_bytes or self.root is None:
            return None
        dtype = np.dtype(self.pool.dtype)
        return DiskTier(self.root, self.layout, num_bytes, dtype, self.links)

    # ---- a turn: find, acquire, publish, commit, release ----

    def find(
        self, session: str, keys: Sequence[PageKey], tail: Tail | None
    ) -> list[PageEntry]:
        """The longest stored beginning of a prompt.

        Args:
            keys: the full pages of the prompt that may be reused, in order.
            tail: the session's last page, used if exactly the pages before it are
                found.
        """
        found = []
        for key in keys:
            entry = self.index.find(key)
            if entry is None or not entry.tiers:
                break
            found.append(entry)
        if tail is None or tail.index != len(found):
            return found
        entry = self.index.find(tail.key)
        # A tail is written to in place, so it is never shared.
        if entry is not None and entry.tiers and not entry.holds:
            if entry.session in (session, _UNCLAIMED):
                self._tails[session] = entry
                found.append(entry)
        return found

    def acquire(
        self,
        session: str,
        found: Sequence[PageEntry],
        tail: Tail | None,
        num_pages: int,
    ) -> Lease | None:
        """Holds pages that were just found, and slots for the rest of a turn.

        Args:
            found: what `find` gave, or its beginning.
            tail: the same as there.
            num_pages: pages the turn may grow to.

        Returns:
            None when the slots it needs are held by running turns.
        """
        for entry in found:
            entry.holds += 1
        num_new = num_pages - sum(entry.slot is not None for entry in found)
        if not self._free_slots(num_new):
            for entry in found:
                entry.holds -= 1
            return None
        new_slots = iter(self.pool.take(num_new))
        entries = [*found, *[None] * (num_pages - len(found))]
        slots = [
            next(new_slots) if entry is None or entry.slot is None else entry.slot
            for entry in entries
        ]
        tokens_from = dict.fromkeys(Tier, 0)
        for entry in found:
            tokens = self.layout.page_tokens
            if tail is not None and entry.key == tail.key:
                tokens = len(tail.token_ids)
            tokens_from[entry.tiers[0]] += tokens
        now = time.monotonic()
        lease = Lease(
            session=session,
            slots=np.asarray(slots, np.int32),
            entries=entries,
            cached_tokens=sum(tokens_from.values()),
            tokens_from=tokens_from,
            inbound=Inbound(
                self._loads(found, slots),
                self.pool,
                self.links.host_to_device,
                self.watchers["host-to-device"],
            ),
        )
        for entry in found:
            self.index.touch(entry, session, now)
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
            self.counters[f"miss_{reason}"] += len(entries)
            for entry in entries:
                if reason == "copy_failed":
                    self._evictor.leave_host(entry)
                self._evictor.leave_disk(entry)
        return True

    def publish(
        self,
        lease: Lease,
        keys: Sequence[PageKey],
        token_ids: np.ndarray,
        first: int = 0,
    ) -> None:
        """Makes the first `len(keys)` pages of a turn findable by other turns.

        Only after the programs that fill them were dispatched: later ones read them.

        Args:
            first: pages before this one were published already.
        """
        step = self.layout.page_tokens
        for index in range(first, len(keys)):
            page = token_ids[index * step : (index + 1) * step]
            self._publish(lease, index, keys[index], page)

    def save_soon(self, lease: Lease, num_turns: int, turn: str) -> int:
        """Lets published pages of a turn leave the device, if the policy says so now.

        Args:
            num_turns: finished turns of the session.
            turn: the name under which events note it.

        Returns:
            How many pages will leave for that.
        """
        if not self.saves_meanwhile(num_turns):
            return 0
        return self.saver.ask(filter(None, lease.entries), turn)

    def saves_meanwhile(self, num_turns: int) -> bool:
        """Whether a session's new pages leave the device while its turn runs."""
        return not self.config.is_saving_synchronous and self.saves_early(num_turns)

    def saves_early(self, num_turns: int) -> bool:
        """Whether the write policy copies a session's pages out before they must go."""
        match self.config.write_policy:
            case "write_through":
                return True
            case "write_through_selective":
                return num_turns > 0
            case _:
                return False

    def commit(
        self,
        lease: Lease,
        keys: Sequence[PageKey],
        tail: Tail | None,
        record: SessionRecord,
        turn: str = "",
    ) -> int:
        """Ends a turn well: pages findable and saved, then the record, then the old
        tail.

        Args:
            keys: every full page of the conversation.
            tail: its partly filled last page.

        Returns:
            How many pages will leave the device for that.
        """
        self.publish(lease, keys, record.token_ids)
        old_tail = self._tails.pop(lease.session, None)
        if tail is not None:
            self._publish(lease, tail.index, tail.key, tail.token_ids)
            entry = lease.entries[tail.index]
            if entry is not None:
                self._tails[lease.session] = entry
        now = time.monotonic()
        pages = [entry for entry in lease.entries if entry is not None]
        for entry in pages:
            self.index.touch(entry, lease.session, now)
        num_asked = 0
        if self.saves_early(record.num_turns - 1):
            num_asked = self.saver.ask(pages, turn)
            self.saver.save_queued(turn)
        if self.config.is_saving_synchronous:
            self.saver.drain()
        self.catalog.commit(record)
        if old_tail is not None and (tail is None or old_tail.key != tail.key):
            self._evictor.retire(old_tail)
        return num_asked

    def release(self, lease: Lease) -> None:
        """Ends the hold on pages and slots, whatever became of the turn."""
        for slot, entry in zip(lease.slots.tolist(), lease.entries, strict=True):
            if entry is not None:
                entry.holds -= 1
            if entry is None or entry.slot != slot:
                self.pool.give_back(slot)
        lease.entries = []
        lease.slots = lease.slots[:0]

    def poll(self, queue: QueueView) -> None:
        """Notes finished copies, starts queued saves, keeps host memory clean."""
        self._evictor.queue = queue
        self.saver.poll()
        self._evictor.settle_writes()

    def has_disk_room(self, num_pages: int) -> bool:
        """Whether the disk budget takes so many more pages as it is."""
        disk = self.disk
        if disk is None:
            return False
        return disk.used_bytes + num_pages * disk.object_bytes <= disk.capacity_bytes

    def forget_device(self) -> None:
        """Makes the pool anew after a donating call failed; no lease may be live."""
        for entry in list(self.index.in_tier(Tier.DEVICE)):
            entry.slot = None
            self.index.unplace(entry, Tier.DEVICE)
        self.pool.rebuild()

    def empty(self, tier: Tier) -> None:
        """Moves every page that no turn holds out of a tier, downwards if it fits."""
        if tier is Tier.DEVICE:
            held_not = [e for e in self.index.in_tier(tier) if not e.holds]
            self.saver.save_now(held_not)
        self._evictor.empty(tier)

    def rewind(self, tenant: str, session_id: str, num_tokens: int) -> None:
        """Cuts a session's record to its first tokens; ValueError if it has fewer."""
        record = self.catalog.find(tenant, session_id)
        num_known = 0 if record is None else len(record.token_ids)
        if record is None or not 0 <= num_tokens <= num_known:
            raise ValueError(
                f"cannot rewind session {session_id!r} to {num_tokens} tokens;"
                f" it has {num_known}"
            )
        keys = record.page_keys[: num_tokens // self.layout.page_tokens]
        token_ids = record.token_ids[:num_tokens]
        self.catalog.commit(replace(record, token_ids=token_ids, page_keys=keys))

    def forget_session(self, tenant: str, session_id: str) -> None:
        """Forgets a session's record and the pages it answers for; none may be held."""
        session = session_key(tenant, session_id)
        self.catalog.remove(tenant, session_id)
        self._tails.pop(session, None)
        for tier in Tier:
            for entry in list(self.index.last_pages_first(session, tier)):
                self._evictor.retire(entry)

    def close(self) -> None:
        """Writes what only memory holds to disk, as far as it fits; stops threads."""
        self.saver.save_now(list(self.index.in_tier(Tier.DEVICE)))
        self.saver.drain()
        self._evictor.drain()
        if self.root:
            self.root.close()
        for watcher in self.watchers.values():
            watcher.close()

    # ---- parts of them ----

    def _free_slots(self, num_slots: int) -> bool:
        """Whether so many slots are free now; evicts nothing if that is not enough."""
        victims = self._evictor.slot_victims(num_slots)
        if victims is None:
            return False
        self.saver.save_now(victims)
        self._evictor.free_slots(victims)
        return True

    def _loads(self, found: Sequence[PageEntry], slots: list[int]) -> list[Load]:
        loads: dict[int, Load] = {}
        from_disk = []
        for slot, entry in zip(slots, found, strict=False):
            if entry.slot is not None:
                continue
            if entry.slab is None:
                from_disk.append((slot, entry))
                continue
            load = loads.get(id(entry.slab))
            if load is None:
                unused = np.full(entry.slab.num_rows, self.pool.num_slots, np.int32)
                load = Load(slots=unused, source=entry.slab)
                loads[id(entry.slab)] = load
            load.slots[entry.row] = slot
        return [*loads.values(), *self._disk_loads(from_disk)]

    def _disk_loads(self, pages: list[tuple[int, PageEntry]]) -> Iterator[Load]:
        pages_left = iter(pages)
        for size in split_runs(len(pages)):
            run = list(islice(pages_left, size))
            assert self.disk is not None
            entries = [entry for _, entry in run]
            yield Load(
                slots=np.asarray([slot for slot, _ in run], np.int32),
                source=self.disk.read([entry.key for entry in entries]),
                entries=entries,
            )
            self.counters["pages_read"] += size

    def _publish(
        self, lease: Lease, index: int, key: PageKey, token_ids: np.ndarray
    ) -> None:
        slot, entry = int(lease.slots[index]), lease.entries[index]
        if entry is not None and entry.key != key:  # a tail that has grown
            if entry.slot is not None:
                self._evictor.leave_device(entry)
            entry.holds -= 1
            lease.entries[index] = entry = None
        if entry is None:
            entry = self.index.find(key)
            if entry is not None and entry.slot is not None:
                return  # another turn computed the same page first
            if entry is None:
                entry = self.index.add(key, lease.session, token_ids.copy())
            entry.holds += 1
            lease.entries[index] = entry
        if entry.token_ids is None:
            entry.token_ids = token_ids.copy()
        if entry.slot is None:
            entry.slot = slot
            self.index.place(entry, Tier.DEVICE, time.monotonic())
