"""The file that says what the bytes of a root's pages mean; one layout owns a root.

Knows the layout and the check of the tenants' secret. Does not know pages or records.
"""

import contextlib
import json

from cachedattn_jax.store.layout import Layout
from cachedattn_jax.store.objects.guard import Guard, StorageFailure, guarded
from cachedattn_jax.store.objects.io_config import IoConfig
from cachedattn_jax.store.objects.open_kv import first_line, open_kv
from cachedattn_jax.store.objects.salts import Salts

_LAYOUT_KEY = "layout.json"
_SALT_CHECK = "tenant_secret"


def read_layout(url: str, io: IoConfig = IoConfig()) -> Layout:
    """The layout that owns a root; ValueError if there is no store."""
    try:
        found = guarded(open_kv(url, io, False), io).read(_LAYOUT_KEY).result()
    except StorageFailure as failure:
        raise ValueError(f"{url!r} cannot be read: {failure}") from failure
    if found.state != "value":
        raise ValueError(f"{url!r} holds no store: it has no {_LAYOUT_KEY}")
    try:
        return Layout.described(json.loads(found.value))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{url!r} holds a damaged {_LAYOUT_KEY}: {error}") from error


def claim_root(
    kv: Guard, url: str, layout: Layout, salts: Salts, is_writing: bool
) -> None:
    """Takes a root that nobody owns.

    Raises:
        ValueError: another layout owns it, or tenants with another secret.
    """
    wanted = {**layout.describe(), _SALT_CHECK: salts.check}
    try:
        found = kv.read(_LAYOUT_KEY).result()
        if found.state != "value" and is_writing:
            text = json.dumps(wanted, indent=1, sort_keys=True)
            kv.write(_LAYOUT_KEY, [text.encode()]).result()
            return
    except StorageFailure as failure:
        raise ValueError(
            f"disk_root={url!r} cannot be used: {first_line(failure)}"
        ) from failure
    _check_same(url, found.value, wanted)


def _check_same(url: str, text: bytes, wanted: dict[str, int | float | str]) -> None:
    try:
        found = json.loads(text)
        differing = [name for name in wanted if found.get(name) != wanted[name]]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"disk_root={url!r} holds a damaged {_LAYOUT_KEY}") from error
    if differing == [_SALT_CHECK]:
        raise ValueError(
            f"disk_root={url!r} was written with another tenant_secret_file; without it"
            " none of its pages can be found"
        )
    with contextlib.suppress(ValueError):
        differing.remove(_SALT_CHECK)
    if differing:
        name = differing[0]
        raise ValueError(
            f"disk_root={url!r} belongs to another layout:"
            f" its {name} is {found.get(name)!r}, this engine's is {wanted[name]!r};"
            " use another disk_root or delete this one"
        )
