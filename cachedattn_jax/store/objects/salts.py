"""What keeps the pages of tenants apart: a salt of each, from a secret of the operator.

Knows hashing. A tenant's name comes with a request; the secret never does, so nobody
can compute the keys of another tenant's pages.
"""

import hashlib
from pathlib import Path

_LEAST_SECRET_BYTES = 16


class Salts:
    """The salts of one store.

    Args:
        secret: empty for a store whose tenants trust each other.
    """

    def __init__(self, secret: bytes = b"") -> None:
        # Keys of BLAKE2b are short; secrets may be of any length.
        self._key = hashlib.blake2b(secret, digest_size=32).digest() if secret else b""

    def of(self, tenant: str) -> bytes:
        """The salt of a tenant's page keys."""
        name = tenant.encode()
        return hashlib.blake2b(name, key=self._key, digest_size=32).digest()

    @property
    def check(self) -> str:
        """Tells one secret from another and reveals neither."""
        whole = hashlib.blake2b(b"which secret", key=self._key, person=b"check")
        return whole.hexdigest()[:16]


def read_salts(path: str | None) -> Salts:
    """The salts from a file that holds the secret; None for no secret.

    Raises:
        ValueError: the file cannot be read or holds too little.
    """
    if path is None:
        return Salts()
    try:
        secret = Path(path).expanduser().read_bytes().strip()
    except OSError as error:
        raise ValueError(
            f"tenant_secret_file={path!r} cannot be read: {error}"
        ) from error
    if len(secret) < _LEAST_SECRET_BYTES:
        raise ValueError(
            f"tenant_secret_file={path!r} holds {len(secret)} bytes; a secret has at"
            f" least {_LEAST_SECRET_BYTES}"
        )
    return Salts(secret)
