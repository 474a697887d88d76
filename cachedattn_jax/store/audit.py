"""A store root looked at from outside, without an engine: what is there, what is bad.

Knows records, objects and which belong together. Does not know devices or turns.
"""

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice

import numpy as np

from cachedattn_jax.store import page as page_format
from cachedattn_jax.store.catalog import (
    SessionRecord,
    record_in,
    session_key,
    session_name,
)
from cachedattn_jax.store.objects.guard import StorageFailure
from cachedattn_jax.store.objects.io_config import IoConfig
from cachedattn_jax.store.objects.layout_file import read_layout
from cachedattn_jax.store.objects.object_names import (
    PAGES,
    QUARANTINE,
    SESSIONS,
    list_pages,
    page_name,
)
from cachedattn_jax.store.objects.root import Root
from cachedattn_jax.store.objects.salts import Salts
from cachedattn_jax.store.page import BadPage, PageHeader, PageKey
from cachedattn_jax.store.record_pages import record_pages

# Objects that are read at once.
_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One object that was looked at; `reason` is None where all is well."""

    name: str
    reason: str | None


class Audit:
    """An opened root; close it when done.

    Args:
        is_writing: whether objects may be removed; needs the lock of a local root.

    Raises:
        ValueError: there is no store, it cannot be read, or an engine writes to it.
    """

    def __init__(
        self,
        url: str,
        io: IoConfig = IoConfig(),
        salts: Salts | None = None,
        *,
        is_writing: bool = False,
    ) -> None:
        self.layout = read_layout(url, io)
        self.salts = salts or Salts()
        self.root = Root(url, self.layout, io, self.salts, is_writing=is_writing)
        self.object_bytes = page_format.object_bytes(self.layout)

    def __enter__(self) -> "Audit":
        return self

    def __exit__(self, *error: object) -> None:
        self.root.close()

    def sessions(self, tenant: str | None = None) -> list[tuple[str, str]]:
        """(tenant, session id) of every session; reads no record."""
        names = filter(None, map(session_name, self.root.list(SESSIONS)))
        return sorted(name for name in names if tenant in (None, name[0]))

    def record(self, tenant: str, session_id: str) -> SessionRecord | None:
        """The record of a session; None for a damaged or missing one."""
        key = SESSIONS + session_key(tenant, session_id)
        found = self.root.kv.read(key).result()
        if found.state != "value":
            return None
        return record_in(self.root, found.value, (tenant, session_id))

    def pages(self) -> list[str]:
        """Names of all page objects."""
        return [page_name(*page) for page in list_pages(self.root)]

    def names_of_tenant(self, tenant: str) -> list[str]:
        """Everything that is stored of a tenant, records first."""
        folder = session_key(tenant, "-").partition("/")[0]
        return [
            f"{prefix}{folder}/{name}"
            for prefix in (SESSIONS, PAGES, QUARANTINE)
            for name in self.root.list(f"{prefix}{folder}/")
        ]

    def names_of_session(self, tenant: str, session_id: str) -> list[str]:
        """A session's record and the pages that no other session goes on from.

        Raises:
            ValueError: there is no such session.
        """
        others = self.sessions(tenant)
        if (tenant, session_id) not in others:
            raise ValueError(f"tenant {tenant!r} has no session {session_id!r}")
        others.remove((tenant, session_id))
        record = self.record(tenant, session_id)
        pages = set() if record is None else set(self.pages_of(record))
        for name in others:
            other = self.record(*name)
            if other is not None:
                pages.difference_update(self.pages_of(other))
        stored = pages.intersection(self.pages())
        return [SESSIONS + session_key(tenant, session_id), *sorted(stored)]

    def quarantined(self) -> list[str]:
        """Names of all objects that were found bad."""
        return [QUARANTINE + name for name in self.root.list(QUARANTINE)]

    def pages_of(self, record: SessionRecord) -> list[str]:
        """Names of the pages that a session goes on from, stored or not."""
        tenant = session_key(record.tenant, record.session_id).partition("/")[0]
        keys = record_pages(self.layout, self.salts, record)
        return [page_name(tenant, key) for key in keys]

    def orphans(self) -> Iterator[tuple[int, int, list[str]]]:
        """Looks for objects under `pages/` that no session goes on from.

        Yields:
            Records read, of how many, and with the last one the orphans.
        """
        names = {PAGES + name for name in self.root.list(PAGES)}
        sessions = self.sessions()
        for done, name in enumerate(sessions):
            yield done, len(sessions), []
            record = self.record(*name)
            if record is not None:
                names.difference_update(self.pages_of(record))
        yield len(sessions), len(sessions), sorted(names)

    def verify(self, names: list[str]) -> Iterator[Finding]:
        """Reads page objects whole and checks all that they say of themselves."""
        waiting = iter(names)
        checks = [self._submit(name) for name in islice(waiting, _AT_ONCE)]
        while checks:
            yield checks.pop(0).result()
            checks += [self._submit(name) for name in islice(waiting, 1)]

    def read_page(self, name: str) -> tuple[PageHeader, bytes]:
        """A page: its header and its layers.

        Raises:
            BadPage: it is missing or may not be used.
        """
        try:
            found = self.root.kv.read(name).result()
        except StorageFailure as failure:
            raise BadPage(failure.reason) from failure
        if found.state != "value":
            raise BadPage("missing")
        data, layout = found.value, self.layout
        end = page_format.payload_offset(layout)
        header = page_format.decode_header(layout, _key_of(name), data[:end])
        payload = memoryview(data)[end:]
        page_format.verify_layers(layout, header, range(layout.num_layers), [payload])
        return header, bytes(payload)

    def remove(self, name: str) -> None:
        """Deletes an object."""
        self.root.kv.write(name, None).result()

    def quarantine(self, finding: Finding) -> None:
        """Moves a bad page where nobody reads it."""
        tenant, _, _ = finding.name.removeprefix(PAGES).partition("/")
        key = finding.name.removeprefix(f"{PAGES}{tenant}/").replace("/", "")
        self.root.rename(finding.name, f"{QUARANTINE}{tenant}/{key}.{finding.reason}")

    def _submit(self, name: str) -> "Future[Finding]":
        return self.root.submit(self._check, name)

    def _check(self, name: str) -> Finding:
        try:
            self.read_page(name)
        except BadPage as error:
            return Finding(name=name, reason=str(error))
        return Finding(name=name, reason=None)

    def array(self, record: SessionRecord, dtype: np.dtype) -> Iterator[np.ndarray]:
        """The keys and values of a session, page by page.

        Yields:
            [tokens, layers, kv_heads, 2 (K, V), head_dim]; the last page is shorter.

        Raises:
            BadPage: a page is missing or may not be used; the message says which.
        """
        layout = self.layout
        shape = (layout.num_layers, layout.num_kv_heads, 2)
        shape += (layout.page_tokens, layout.head_dim)
        for index, name in enumerate(self.pages_of(record)):
            try:
                header, payload = self.read_page(name)
            except BadPage as error:
                raise BadPage(f"page {index} of the session: {error}") from error
            page = np.frombuffer(payload, dtype).reshape(shape)
            yield np.moveaxis(page, 3, 0)[: len(header.token_ids)]


def orphan_bytes(url: str) -> int:
    """Bytes in a local root that nothing refers to, whatever they are."""
    with Audit(url) as audit:
        *_, (_, _, orphans) = audit.orphans()
        folder = audit.root.folder
        assert folder is not None
        known = {"layout.json", "writer.lock", *audit.pages(), *audit.quarantined()}
        known |= {SESSIONS + session_key(*name) for name in audit.sessions()}
        known -= set(orphans)
        files = [path for path in folder.rglob("*") if path.is_file()]
        return sum(
            path.stat().st_size
            for path in files
            if path.relative_to(folder).as_posix() not in known
        )


def _key_of(name: str) -> PageKey:
    """The key in a page's name; none that any page has if it is no such name."""
    try:
        return bytes.fromhex("".join(name.split("/")[2:]))
    except ValueError:
        return b""
