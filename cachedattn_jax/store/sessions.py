"""What becomes of conversations between their turns: cut, thinned, forgotten, erased.

Knows records, and that a session answers for pages. Does not know running turns, or
where pages are.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace

from cachedattn_jax.store.catalog import Catalog, done_already, session_key
from cachedattn_jax.store.disk_tier import DiskTier
from cachedattn_jax.store.evictor import Evictor
from cachedattn_jax.store.finder import Finder
from cachedattn_jax.store.objects.object_names import remove_folders
from cachedattn_jax.store.objects.root import Root
from cachedattn_jax.store.page_index import tenant_of
from cachedattn_jax.store.placement.placement import Placement
from cachedattn_jax.store.saver import Saver
from cachedattn_jax.store.truncation import Context, Truncation, context_after


class Sessions:
    """Sessions of one store, none of whose turns may be under way when they change."""

    def __init__(
        self,
        catalog: Catalog,
        placement: Placement,
        finder: Finder,
        saver: Saver,
        evictor: Evictor,
        root: Root | None,
        disk: DiskTier | None,
    ) -> None:
        self._catalog = catalog
        self._placement = placement
        self._finder = finder
        self._saver = saver
        self._evictor = evictor
        self._root = root
        self._disk = disk

    def rewind(self, tenant: str, session_id: str, num_tokens: int) -> None:
        """Cuts a session's record to its first tokens; ValueError if it has fewer."""
        record = self._catalog.find(tenant, session_id)
        num_known = 0 if record is None else len(record.token_ids)
        if record is None or not 0 <= num_tokens <= num_known:
            raise ValueError(
                f"cannot rewind session {session_id!r} to {num_tokens} tokens;"
                f" it has {num_known}"
            )
        self._catalog.commit(record.cut(num_tokens))

    def discard(self, tenant: str, session_id: str, tokens: Sequence[int]) -> None:
        """Notes that tokens left a session's context; ValueError if they are not in it.

        They are the token-discarding list of the paper's section 3.4.
        """
        record = self._catalog.find(tenant, session_id)
        num_cached = 0 if record is None else record.cached_length
        context = Context() if record is None else context_after(record.truncations)
        places = sorted(set(map(int, tokens)))
        for token in places:
            is_known = 0 <= token < num_cached
            if not is_known or context.token(context.position(token)) != token:
                raise ValueError(
                    f"token {token} of session {session_id!r} cannot be discarded: its"
                    f" context is what is left of the first {num_cached} tokens"
                )
        if record is None or not places:
            return
        spans = tuple((p, p + 1) for p in map(context.position, places))
        new = Truncation(at=num_cached, dropped=spans, method="repack")
        truncations = (*record.truncations, new)
        self._catalog.commit(replace(record, truncations=truncations, chain=None))

    def pin(self, tenant: str, session_id: str, is_pinned: bool) -> "Future[None]":
        """Keeps a session's pages where they are, or lets them go again.

        The future ends when that is stored; a session without a record has it with its
        first.

        Raises:
            StorageFailure: the record is stored and cannot be read now.
        """
        record = self._catalog.find(tenant, session_id)
        session = session_key(tenant, session_id)
        self._placement.pinned(session, is_pinned, tenant)
        if record is None or record.is_pinned == is_pinned:
            return done_already()
        return self._catalog.commit(replace(record, is_pinned=is_pinned))

    def is_pinned(self, tenant: str, session_id: str) -> bool:
        """Whether a session's pages stay where they are."""
        standing = self._placement.standings.get(session_key(tenant, session_id))
        return standing is not None and standing.is_pinned

    def forget(self, tenant: str, session_id: str) -> "Future[None]":
        """Forgets a session's record and the pages it answers for; none may be held.

        The future ends when the record is gone for good.
        """
        session = session_key(tenant, session_id)
        removed = self._catalog.remove(tenant, session_id)
        self._forget_pages(session)
        return removed

    def erase_tenant(self, tenant: str) -> "Future[None]":
        """Erases all that is known of a tenant, none of whose turns may be under way.

        The future ends when nothing of it is stored any more, and fails with
        StorageFailure when that could not be reached.
        """
        self._saver.drain()
        self._evictor.settle_all()
        for name in self._catalog.sessions(tenant):
            self.forget(*name)
        folder = tenant_of(session_key(tenant, "-"))
        for session in list(map(str, self._placement.standings)):
            if tenant_of(session) == folder:
                self._forget_pages(session)
        if self._root is None:
            return done_already()
        leaving = self._disk.leaving if self._disk else ()
        return self._root.submit_in_order(remove_folders, self._root, folder, leaving)

    def lose(self, session: str) -> None:
        """Gives up all pages of a session that no turn holds; its record stays."""
        self._evictor.drop(session, "invalidated")

    def _forget_pages(self, session: str) -> None:
        self._finder.tails.pop(session, None)
        self._evictor.drop(session, "forgotten")
        self._saver.departures.forget(session)
        self._placement.forgot(session)
