"""Records of a root, and the pages that they go on from.

Knows records and keys. Does not know which of the pages are stored.
"""

from collections.abc import Iterable, Iterator

from cachedattn_jax.store.catalog import (
    SessionRecord,
    decode_record,
    session_key,
)
from cachedattn_jax.store.layout import Layout
from cachedattn_jax.store.object_names import SESSIONS
from cachedattn_jax.store.page import PageKey, chain_keys, next_key
from cachedattn_jax.store.root import Root
from cachedattn_jax.store.salts import Salts


def record_pages(layout: Layout, salts: Salts, record: SessionRecord) -> list[PageKey]:
    """Keys of the pages that a session goes on from, its tail included."""
    salt = salts.of(record.tenant)
    cached = record.token_ids[: record.cached_length]
    keys = chain_keys(layout, salt, cached, [])
    rest = cached[len(keys) * layout.page_tokens :]
    return [*keys, next_key(layout, salt, keys, rest)] if len(rest) else keys


def read_records(
    root: Root, sessions: Iterable[tuple[str, str]]
) -> Iterator[tuple[tuple[str, str], SessionRecord | None]]:
    """Records of sessions one after the other; None for a damaged or vanished one.

    Raises:
        StorageFailure: one cannot be read now.
    """
    for name in sessions:
        found = root.kv.read(SESSIONS + session_key(*name)).result()
        record = decode_record(found.value) if found.state == "value" else None
        is_right = record is not None and (record.tenant, record.session_id) == name
        yield name, record if is_right else None
