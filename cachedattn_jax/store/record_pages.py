"""Records of a root, and the pages that they go on from.

Knows records and keys. Does not know which of the pages are stored.
"""

from collections.abc import Iterable, Iterator

from cachedattn_jax.store.catalog import (
    SessionRecord,
    record_in,
    session_key,
)
from cachedattn_jax.store.chain import Chain
from cachedattn_jax.store.layout import Layout
from cachedattn_jax.store.objects.object_names import SESSIONS
from cachedattn_jax.store.objects.root import Root
from cachedattn_jax.store.objects.salts import Salts
from cachedattn_jax.store.page import PageKey


def record_pages(layout: Layout, salts: Salts, record: SessionRecord) -> list[PageKey]:
    """Keys of the pages that a session goes on from, its tail included."""
    chain = Chain(layout=layout, salt=salts.of(record.tenant)).after(
        record.token_ids, record.truncations, record.cached_length
    )
    tail = chain.tail(record.token_ids)
    return chain.keys if tail is None else [*chain.keys, tail.key]


def read_records(
    root: Root, sessions: Iterable[tuple[str, str]]
) -> Iterator[tuple[tuple[str, str], SessionRecord | None]]:
    """Records of sessions one after the other; None for a damaged or vanished one.

    Raises:
        StorageFailure: one cannot be read now.
    """
    for name in sessions:
        found = root.kv.read(SESSIONS + session_key(*name)).result()
        is_there = found.state == "value"
        yield name, record_in(root, found.value, name) if is_there else None
