"""Names of objects in a root. Knows folders; does not know what the objects hold."""

from collections.abc import Sequence
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING

from cachedattn_jax.store.page import PageKey

if TYPE_CHECKING:
    from cachedattn_jax.store.objects.root import Root

PAGES = "pages/"
QUARANTINE = "quarantine/"
SESSIONS = "sessions/"

_KEY_LETTERS = frozenset("0123456789abcdef/")


def list_pages(root: "Root") -> list[tuple[str, PageKey]]:
    """(tenant, key) of every page object of a root; what is no page is passed over.

    Tenants are quoted, as in names of sessions.
    """
    found = []
    for name in root.list(PAGES):
        tenant, _, key = name.partition("/")
        if len(key) == 65 and key[2] == "/" and set(key) <= _KEY_LETTERS:
            found.append((tenant, bytes.fromhex(key.replace("/", ""))))
    return found


def page_name(tenant: str, key: PageKey) -> str:
    """Where a page of a tenant, whose name is quoted, lies in the root."""
    # Two levels of folders keep a local folder below some thousand entries.
    name = key.hex()
    return f"{PAGES}{tenant}/{name[:2]}/{name[2:]}"


def remove_folders(
    root: "Root", tenant: str, after: Sequence[Future[None]] = ()
) -> None:
    """Deletes every object of a tenant, whose name is quoted.

    Args:
        after: deletions under way, which hold locks beside the objects.

    Raises:
        StorageFailure: something may be left.
    """
    wait(after)
    for prefix in (SESSIONS, PAGES, QUARANTINE):
        for name in root.list(f"{prefix}{tenant}/"):
            root.kv.write(f"{prefix}{tenant}/{name}", None).result()
