"""A file that stays open between the reads of one object.

Knows a descriptor. Does not know what is read.
"""

import os


class OpenFile:
    """Opened by the first read; stores that have no files leave it alone.

    The kernel's read-ahead, which grows with every read that goes on where the last one
    ended, belongs to the descriptor. It is closed with its last user, since a read that
    hangs may use it longer than whoever waited for that read.
    """

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def open(self, path: str) -> int:
        """The descriptor of the file; FileNotFoundError if there is none."""
        if self._descriptor is None:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._descriptor

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
