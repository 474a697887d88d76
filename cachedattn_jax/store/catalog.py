"""Session records: what each conversation said, and when.

Knows tokens, truncations and times. Does not know pages: their keys follow from these,
so a record stays right whatever happens to the pages. The record is the only thing in a
store that changes, and it is written last.
"""

import base64
import json
import urllib.parse
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import crc32c
import numpy as np

from cachedattn_jax.store.chain import Chain
from cachedattn_jax.store.root import Root
from cachedattn_jax.store.truncation import Truncation, truncations_before

_MAX_NAME_BYTES = 200  # file systems end at 255 for one name
_PREFIX = "sessions/"


@dataclass(frozen=True, kw_only=True)
class SessionRecord:
    """One conversation after its last finished turn.

    Attributes:
        token_ids: int32, prompts and replies in order. The last one was sampled but
            never fed back, so the cached length is one less.
        num_turns: finished turns.
        used_at: seconds since the epoch, of the last finished turn.
        truncations: what left the context of the model, in the order it happened.
        chain: its pages; they follow from tokens and truncations and are not stored.
    """

    session_id: str
    tenant: str
    token_ids: np.ndarray
    num_turns: int
    used_at: float
    truncations: tuple[Truncation, ...] = ()
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
    """All session records; kept in memory, and in the root if there is one."""

    def __init__(self, root: Root | None) -> None:
        self._root = root
        self._records: dict[tuple[str, str], SessionRecord] = {}
        self._stored: set[tuple[str, str]] = set()
        for name in root.list(_PREFIX) if root else ():
            tenant, _, session_id = name.partition("/")
            self._stored.add((_unquoted(tenant), _unquoted(session_id)))

    def sessions(self) -> list[tuple[str, str]]:
        """(tenant, session id) of every known session; reads no record."""
        return sorted(self._stored | self._records.keys())

    def find(self, tenant: str, session_id: str) -> SessionRecord | None:
        """The record of a session; a damaged one counts as absent."""
        name = (tenant, session_id)
        if name not in self._records and name in self._stored and self._root:
            found = self._root.kv.read(_key(*name)).result()
            record = _decode(found.value) if found.state == "value" else None
            if record is None or (record.tenant, record.session_id) != name:
                self._stored.discard(name)
                return None
            self._records[name] = record
        return self._records.get(name)

    def commit(self, record: SessionRecord) -> "Future[None]":
        """Makes the record the session's state; the future ends when it is stored."""
        name = (record.tenant, record.session_id)
        self._records[name] = record
        if self._root is None:
            done: Future[None] = Future()
            done.set_result(None)
            return done
        self._stored.add(name)
        return self._root.write_in_order(_key(*name), _encode(record))

    def remove(self, tenant: str, session_id: str) -> None:
        """Forgets a session."""
        name = (tenant, session_id)
        self._records.pop(name, None)
        if name in self._stored and self._root:
            self._stored.discard(name)
            self._root.write_in_order(_key(*name), None)


def session_key(tenant: str, session_id: str) -> str:
    """One name for a session of a tenant, unlike that of any other."""
    return f"{_quoted(tenant)}/{_quoted(session_id)}"


def check_id(what: str, value: str) -> None:
    """Raises ValueError unless `value` can name a session or a tenant."""
    num_bytes = len(_quoted(value))
    if not 1 <= num_bytes <= _MAX_NAME_BYTES:
        raise ValueError(
            f"{what}={value!r} must take 1 to {_MAX_NAME_BYTES} bytes when"
            f" percent-encoded, it takes {num_bytes}"
        )


def _key(tenant: str, session_id: str) -> str:
    return _PREFIX + session_key(tenant, session_id)


def _quoted(name: str) -> str:
    # "." and ".." would be folders.
    return urllib.parse.quote(name, safe="").replace(".", "%2E")


def _unquoted(name: str) -> str:
    return urllib.parse.unquote(name)


def _encode(record: SessionRecord) -> bytes:
    body = json.dumps(
        {
            "session_id": record.session_id,
            "tenant": record.tenant,
            "num_turns": record.num_turns,
            "used_at": record.used_at,
            "truncations": [
                [item.at, item.dropped, item.method] for item in record.truncations
            ],
            "token_ids": base64.b64encode(
                np.ascontiguousarray(record.token_ids, "<i4").tobytes()
            ).decode(),
        }
    ).encode()
    return b"%08x\n" % crc32c.crc32c(body) + body


def _decode(data: bytes) -> SessionRecord | None:
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
