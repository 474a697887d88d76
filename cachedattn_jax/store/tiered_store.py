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
from cachedattn_jax.store.host_tier import HostTier, Slab
from cachedattn_jax.store.layout import Layout
from cachedattn_jax.store.lease import Lease, Load
from cachedattn_jax.store.page import PageKey, Tail
from cachedattn_jax.store.page_index import PageEntry, PageIndex
from cachedattn_jax.store.placement import QueueView, Tier, policy
from cachedattn_jax.store.root import Root

# Owner of pages found on disk at start-up until a session uses them: first to go.
_UNCLAIMED = ""


class TieredStore:
    """Pages of all sessions in device, host and disk memory under three budgets."""

    def __init__(self, layout: Layout, config: StoreConfig, device: jax.Device) -> None:
        self.layout = layout
        self.config = config
        self.pool = DevicePool(layout, config.num_slots(layout), device)
        self.host = HostTier(config.num_host_bytes)
        self.root = Root(config.disk_root, layout) if config.disk_root else None
        self.disk = self._open_disk()
        self.catalog = Catalog(self.root)
        self.index = PageIndex(policy(config.policy))
        self.counters: Counter[str] = Counter()
        self._evictor = Evictor(
            self.index, self.pool, self.host, self.disk, self.counters
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
        return DiskTier(self.root, self.layout, num_bytes, dtype)

    # ---- a turn: acquire, settle, publish, commit, release ----

    def acquire(
        self, session: str, keys: Sequence[PageKey], tail: Tail | None, num_pages: int
    ) -> Lease | None:
        """Holds the longest stored beginning of a prompt, and slots for the rest.

        Args:
            keys: the full pages of the prompt that may be reused, in order.
            tail: the session's last page, used if exactly the pages before it are
                found.
            num_pages: pages the turn may grow to.

        Returns:
            None when the slots it needs are held by running turns.
        """
        found = self._stored_beginning(session, keys, tail)
        for entry in found:
            entry.holds += 1
        num_new = num_pages - sum(entry.slot is not None for entry in found)
        if not self._evictor.free_slots(num_new):
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
        lease = Lease(
            session=session,
            slots=np.asarray(slots, np.int32),
            entries=entries,
            cached_tokens=sum(tokens_from.values()),
            tokens_from=tokens_from,
            loads=self._loads(found, slots),
        )
        now = time.monotonic()
        for entry in found:
            self.index.touch(entry, session, now)
        return lease

    def settle(self, lease: Lease) -> bool:
        """Forgets pages that turned out bad on arrival; False if there were any.

        Only after `lease.is_ready`. A lease that did not settle is to be released and
        acquired anew.
        """
        is_good = True
        for load in lease.loads:
            if isinstance(load.source, Slab):
                continue
            for index, reason in load.source.result().bad.items():
                is_good = False
                self.counters[f"miss_{reason}"] += 1
                self._evictor.leave_disk(load.entries[index])
        return is_good

    def publish(
        self, lease: Lease, keys: Sequence[PageKey], token_ids: np.ndarray
    ) -> None:
        """Makes the first `len(keys)` pages of a turn findable by other turns.

        Only after the programs that fill them were dispatched: later ones read them.
        """
        step = self.layout.page_tokens
        for index, key in enumerate(keys):
            self._publish(
                lease, index, key, token_ids[index * step : (index + 1) * step]
            )

    def commit(
        self,
        lease: Lease,
        keys: Sequence[PageKey],
        tail: Tail | None,
        record: SessionRecord,
    ) -> None:
        """Ends a turn well: pages findable and saved, then the record, then the old
        tail.

        Args:
            keys: every full page of the conversation.
            tail: its partly filled last page.
        """
        self.publish(lease, keys, record.token_ids)
        old_tail = self._tails.pop(lease.session, None)
        if tail is not None:
            self._publish(lease, tail.index, tail.key, tail.token_ids)
            entry = lease.entries[tail.index]
            if entry is not None:
                self._tails[lease.session] = entry
        now = time.monotonic()
        for entry in filter(None, lease.entries):
            self.index.touch(entry, lease.session, now)
        self._save([entry for entry in lease.entries if entry is not None])
        self.catalog.commit(record)
        if old_tail is not None and (tail is None or old_tail.key != tail.key):
            self._evictor.retire(old_tail)

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
        """Takes note of finished writes and keeps room in host memory within reach."""
        self._evictor.queue = queue
        self._evictor.settle_writes()

    def forget_device(self) -> None:
        """Makes the pool anew after a donating call failed; no lease may be live."""
        for entry in list(self.index.in_tier(Tier.DEVICE)):
            entry.slot = None
            self.index.unplace(entry, Tier.DEVICE)
        self.pool.rebuild()

    def empty(self, tier: Tier) -> None:
        """Moves every page that no turn holds out of a tier, downwards if it fits."""
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
        self._evictor.drain()
        if self.root:
            self.root.close()

    # ---- finding and loading ----

    def _stored_beginning(
        self, session: str, keys: Sequence[PageKey], tail: Tail | None
    ) -> list[PageEntry]:
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

    def _loads(self, found: list[PageEntry], slots: list[int]) -> list[Load]:
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

    # ---- saving ----

    def _save(self, entries: list[PageEntry]) -> None:
        unsaved = [
            entry
            for entry in entries
            if entry.slab is None and not entry.on_disk and not entry.is_writing
        ]
        unsaved_left = iter(unsaved)
        for size in split_runs(len(unsaved)):
            self._save_run(list(islice(unsaved_left, size)))

    def _save_run(self, run: list[PageEntry]) -> None:
        num_bytes = len(run) * self.layout.page_bytes
        has_room = self._evictor.make_host_room(num_bytes)
        if not has_room and not self.disk:
            self.counters["pages_not_saved"] += len(run)
            return
        slots = [entry.slot for entry in run if entry.slot is not None]
        groups = self.pool.extract(slots)
        self.counters["bytes_device_to_host"] += num_bytes
        slab = self.host.admit(groups) if has_room else None
        for row, entry in enumerate(run):
            if slab is None:
                self._evictor.write(entry, groups, row)
            else:
                entry.slab, entry.row = slab, row
                self.index.place(entry, Tier.HOST, time.monotonic())
