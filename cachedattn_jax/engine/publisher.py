"""Pages of running turns become findable, and leave the device while the turn goes on.

Knows when a page is full and what a turn has published. Does not know where there is
room for it. Paper, section 3.2.2.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from cachedattn_jax.engine.engine_config import EngineConfig
from cachedattn_jax.engine.job import Job
from cachedattn_jax.store.budget import SAVED_TOGETHER
from cachedattn_jax.store.groupwise_save import GroupwiseSave
from cachedattn_jax.store.tiered_store import TieredStore


class Publisher:
    """Publishes full pages of a turn; does nothing where no page is reused."""

    def __init__(self, config: EngineConfig, store: TieredStore) -> None:
        self._is_reusing = config.reuse == "cached"
        self._store = store

    def begin(self, job: Job) -> None:
        """Before a prefill: room for the pages that can be saved while it computes."""
        if not self._saves_meanwhile(job) or job.plan.truncates_meanwhile:
            return
        store, lease = self._store, job.lease
        step = store.layout.page_tokens
        first, last = -(-lease.cached_tokens // step), len(job.plan.whole.pages)
        pages = range(first, last)
        slots = lease.slots[first:last].tolist()
        job.save = GroupwiseSave(
            store.saver.departures, store.pool, pages, slots, job.name
        )

    def save_group(self, job: Job, group: int) -> None:
        """Saves a layer group of these pages, which was dispatched.

        The last leaves with `publish`, behind the first token: in front of it, 3 ms of
        pages delayed the token by as much on an H100.
        """
        if job.save is not None and group + 1 < self._store.layout.num_groups:
            with self._abandoned_if_it_fails(job):
                job.save.save(group)

    @contextmanager
    def _abandoned_if_it_fails(self, job: Job) -> Iterator[None]:
        try:
            yield
        except Exception:  # the turn does not need what is saved meanwhile
            self._store.counters["save_failures"] += 1
            job.abandon_save()

    def publish(self, job: Job) -> None:
        """Makes the full pages of dispatched programs findable."""
        if not self._is_reusing:
            return
        store = self._store
        job.follow()
        store.leases.publish(job.lease, job.unpublished())
        if job.save is not None:
            num_bytes = job.save.num_bytes
            with self._abandoned_if_it_fails(job):
                job.save.finish(job.lease.entries)
                job.save = None
                job.turn.bytes_device_to_host += num_bytes
        num_pages = store.save_soon(job.lease, job.turn.turn_index, job.name)
        job.turn.bytes_device_to_host += num_pages * store.layout.page_bytes

    def publish_filled(self, job: Job) -> None:
        """The same after a reply token, if it filled the last page of a run that is
        saved now.
        """
        if not self._saves_meanwhile(job):
            return
        # What is dropped are whole pages, so they still fill up when they did.
        step, position = self._store.layout.page_tokens, job.context.position
        num_filled, rest = divmod(position(job.num_known), step)
        if rest:
            return
        if num_filled - position(job.num_published) // step >= SAVED_TOGETHER:
            self.publish(job)

    def _saves_meanwhile(self, job: Job) -> bool:
        saves = self._store.config.saves_meanwhile
        return self._is_reusing and saves(job.turn.turn_index)
