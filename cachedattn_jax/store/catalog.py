"""Session records: what each conversation said, and when.

Knows tokens, truncations and times. Does not know pages: their keys follow from these,
so a record stays right whatever happens to the pages. The record is the only thing in a
store that changes, and it is written last.
"""

import base64
import json
import urllib.parse
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from itertools import islice

import crc32c
import numpy as np

from cachedattn_jax.store.chain import Chain
from cachedattn_jax.store.objects.guard import StorageFailure
from cachedattn_jax.store.objects.object_names import QUARANTINE, SESSIONS
from cachedattn_jax.store.objects.root import Root
from cachedattn_jax.store.record_writer import RecordWriter
from cachedattn_jax.store.truncation import Truncation, truncations_before

_MAX_NAME_BYTES = 200  # file systems end at 255 for one name
# Damage that is gone when it is read again came from the way, not from the disk.
_READS_OF_DAMAGED = 3
_MAX_IN_MEMORY = 10_000


@dataclass(frozen=True, kw_only=True)
class SessionRecord:
    """One conversation after its last finished turn.

    Attributes:
        token_ids: int32, prompts and replies in order. The last one was sampled but
            never fed back, so the cached length is one less.
        num_turns: finished turns.
        used_at: seconds since the epoch, of the last finished turn.
        truncations: what left the context of the model, in the order it happened.
        is_pinned: whether its pages were to stay when the record was written.
        chain: its pages; they follow from tokens and truncations and are not stored.
    """

    session_id: str
    tenant: str
    token_ids: np.ndarray
    num_turns: int
    used_at: float
    truncations: tuple[Truncation, ...] = ()
    is_pinned: bool = False
    chain: Chain | None = field(default=None, compare=False)

    @property
    def cached_length(self) -> int:
        """Tokens whose keys and values were computed."""
        return max(0, len(self.token_ids) - 1)

    def cut(self, num_tokens: int) -> "SessionRecord":
        """The record when only its first tokens had been said."""
        cached = max(0, num_tokens - 1)
        return replace(
            self,
            token_ids=self.token_ids[:num_tokens],
            truncations=truncations_before(cached, self.truncations),
            chain=None,
        )


class Catalog:
    """All session records; kept in memory, and in the root if there is one.

    Args:
        on_read: is told of every record that comes from the root.
    """

    def __init__(
        self,
        root: Root | None,
        on_read: Callable[[SessionRecord], None] = lambda record: None,
    ) -> None:
        self._root = root
        self._on_read = on_read
        self._records: dict[tuple[str, str], SessionRecord] = {}
        self._stored: set[tuple[str, str]] = set()
        self._writer = RecordWriter(root, self._lose) if root else None
        names = root.list(SESSIONS) if root else ()
        self._stored.update(filter(None, map(session_name, names)))

    @property
    def num_unstored(self) -> int:
        """Records that are not in the root yet, though they shall be."""
        return self._writer.num_unstored if self._writer else 0

    @property
    def num_sessions(self) -> int:
        return len(self._stored | self._records.keys())

    def sessions(self, tenant: str | None = None) -> list[tuple[str, str]]:
        """(tenant, session id) of every known session; reads no record."""
        names = self._stored | self._records.keys()
        return sorted(name for name in names if tenant in (None, name[0]))

    def find(
        self, tenant: str, session_id: str, *, is_fresh: bool = False
    ) -> SessionRecord | None:
        """The record of a session; a damaged one counts as absent.

        Args:
            is_fresh: whether to look for what other replicas have written, in a shared
                root.

        Raises:
            StorageFailure: it is stored, not in memory, and cannot be read now.
        """
        name = (tenant, session_id)
        root, writer = self._root, self._writer
        if root is None or writer is None or writer.is_pending(_key(*name)):
            return self._records.get(name)
        is_known = name in self._records
        may_differ = is_fresh and root.is_shared
        if may_differ or (name in self._stored and not is_known):
            try:
                self._read(root, writer, name)
            except StorageFailure as failure:
                # What is known may be out of date; committing over it would be noticed.
                if is_known or name not in self._stored:
                    return self._records.get(name)
                raise StorageFailure(
                    failure.reason,
                    f"the record of session {session_id!r} cannot be read now",
                ) from failure
        return self._records.get(name)

    def known(self, tenant: str, session_id: str) -> SessionRecord | None:
        """The record of a session if it is in memory."""
        return self._records.get((tenant, session_id))

    def commit(self, record: SessionRecord) -> "Future[None]":
        """Makes the record the session's state; the future ends when it is stored.

        It fails with StorageFailure when the first try did (the store goes on trying),
        and with RecordConflict when another replica was faster; the session is what
        that one says then.
        """
        name = (record.tenant, record.session_id)
        self._records.pop(name, None)
        self._records[name] = record
        if self._writer is None:
            return done_already()
        self._stored.add(name)
        self._trim(self._writer)
        return self._writer.write(_key(*name), _encode(record))

    def remove(self, tenant: str, session_id: str) -> "Future[None]":
        """Forgets a session; the future ends when nothing of it is stored."""
        name = (tenant, session_id)
        self._records.pop(name, None)
        if name not in self._stored or self._writer is None:
            return done_already()
        self._stored.discard(name)
        return self._writer.write(_key(*name), None)

    def poll(self) -> None:
        """Tries again to write what could not be written."""
        if self._writer is not None:
            self._writer.poll()

    def close(self) -> None:
        """Tries a last time to write what could not be written, and waits."""
        if self._writer is not None:
            wait(self._writer.try_again())

    def _read(self, root: Root, writer: RecordWriter, name: tuple[str, str]) -> None:
        """Takes in what the root says of a session."""
        key = _key(*name)
        known = writer.generations.get(key) if name in self._records else None
        for _ in range(_READS_OF_DAMAGED):
            found = root.kv.read(key, if_not_equal=known).result()
            if found.state == "unspecified":  # not changed since
                return
            writer.generations[key] = found.stamp.generation
            self._records.pop(name, None)
            if found.state != "value":
                self._stored.discard(name)
                return
            record = record_in(root, found.value, name)
            if record is not None:
                self._records[name] = record
                self._stored.add(name)
                self._trim(writer)
                self._on_read(record)
                return
            known = None
        root.kv.count("records_damaged")
        self._stored.discard(name)
        writer.generations.pop(key, None)
        root.rename(key, f"{QUARANTINE}{session_key(*name)}.record")

    def _lose(self, key: str) -> None:
        """Another replica has changed the session: what is known here is void."""
        name = session_name(key.removeprefix(SESSIONS))
        if name is not None:
            self._records.pop(name, None)

    def _trim(self, writer: RecordWriter) -> None:
        """Forgets the records in memory that were not used for longest."""
        num_over = max(0, len(self._records) - _MAX_IN_MEMORY)
        for name in list(islice(self._records, num_over)):
            if not writer.is_pending(_key(*name)):
                del self._records[name]


def done_already() -> "Future[None]":
    """For what nothing has to be stored for."""
    done: Future[None] = Future()
    done.set_result(None)
    return done


def session_key(tenant: str, session_id: str) -> str:
    """One name for a session of a tenant, unlike that of any other."""
    return f"{_quoted(tenant)}/{_quoted(session_id)}"


def session_name(key: str) -> tuple[str, str] | None:
    """(tenant, session id) that a `session_key` was made from; None for another."""
    tenant, _, session_id = key.partition("/")
    if not tenant or not session_id or "/" in session_id:
        return None
    return urllib.parse.unquote(tenant), urllib.parse.unquote(session_id)


def check_id(what: str, value: str) -> None:
    """Raises ValueError unless `value` can name a session or a tenant."""
    num_bytes = len(_quoted(value))
    if not 1 <= num_bytes <= _MAX_NAME_BYTES:
        raise ValueError(
            f"{what}={value!r} must take 1 to {_MAX_NAME_BYTES} bytes when"
            f" percent-encoded, it takes {num_bytes}"
        )


def _key(tenant: str, session_id: str) -> str:
    return SESSIONS + session_key(tenant, session_id)


def _quoted(name: str) -> str:
    # "." and ".." would be folders.
    return urllib.parse.quote(name, safe="").replace(".", "%2E")


def _encode(record: SessionRecord) -> bytes:
    body = json.dumps(
        {
            "session_id": record.session_id,
            "tenant": record.tenant,
            "num_turns": record.num_turns,
            "used_at": record.used_at,
            "is_pinned": record.is_pinned,
            "truncations": [
                [item.at, item.dropped, item.method] for item in record.truncations
            ],
            "token_ids": base64.b64encode(
                np.ascontiguousarray(record.token_ids, "<i4").tobytes()
            ).decode(),
        }
    ).encode()
    return b"%08x\n" % crc32c.crc32c(body) + body


def record_in(root: Root, data: bytes, name: tuple[str, str]) -> SessionRecord | None:
    """The record that a session's bytes hold; None, and counted, where they are damaged
    or another session's.

    Args:
        name: tenant and session id.
    """
    record = _decode(data)
    if record is not None and (record.tenant, record.session_id) == name:
        return record
    root.kv.count("corrupt_record")
    return None


def _decode(data: bytes) -> SessionRecord | None:
    """The record that was written; None for damaged bytes."""
    checksum, _, body = data.partition(b"\n")
    if checksum != b"%08x" % crc32c.crc32c(body):
        return None
    fields = json.loads(body)
    fields["token_ids"] = np.frombuffer(base64.b64decode(fields["token_ids"]), "<i4")
    fields["truncations"] = tuple(
        Truncation(at=at, dropped=tuple(map(tuple, dropped)), method=method)
        for at, dropped, method in fields.get("truncations", ())
    )
    return SessionRecord(**fields)
