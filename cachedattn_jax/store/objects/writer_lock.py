"""One writer for a folder: a lock that ends with its process, however that ends.

Knows a file and its lock. Does not know what the folder holds.
"""

import datetime
import fcntl
import os
import socket
from pathlib import Path

LOCK_NAME = "writer.lock"


class WriterLock:
    """Held from its making until `release`; the kernel releases it on kill -9 too.

    Raises:
        ValueError: another process, or another engine of this one, holds it.
    """

    def __init__(self, folder: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._file: int | None = os.open(folder / LOCK_NAME, flags, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(self._file, 200, 0).decode().strip()
            self.release()
            raise ValueError(
                f"disk_root={str(folder)!r} is in use by {holder or 'another process'};"
                " stop that one or use another disk_root (replicas share an object"
                " store, not a folder)"
            ) from None
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        holder = f"process {os.getpid()} on {socket.gethostname()} since {now}"
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, holder.encode(), 0)

    def release(self) -> None:
        """Lets others write; the file stays, since removing it would be a race."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def __del__(self) -> None:
        # An engine that nobody closed is gone, and so is its lock.
        self.release()
