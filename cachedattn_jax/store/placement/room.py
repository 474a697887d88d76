"""How far memory reaches: the windows of sections 3.3.1 and 3.3.2, and the reserve.

Knows bytes and counts. Does not know who holds them.
"""


class Room:
    """Capacities, and what is needed of them now.

    Args:
        host_reserve, refill: see `PlacementConfig`.

    Attributes:
        running_host_bytes: host memory of sessions whose turns run.
        num_stored, stored_kv_bytes: sessions with pages below the device, and the size
            of their whole caches.
    """

    def __init__(
        self, host_reserve: float, refill: float, *, host_bytes: int, disk_bytes: int
    ) -> None:
        self.reserve_bytes = int(host_reserve * host_bytes)
        self.running_host_bytes = 0
        self.num_stored = 0
        self.stored_kv_bytes = 0
        self._refilled_bytes = int((1 + refill) * self.reserve_bytes)
        self._is_refilling = False
        self._host_bytes = host_bytes
        self._disk_bytes = disk_bytes

    @property
    def prefetch_window(self) -> int:
        """C_mem / S_kv, the waiting turns that memory has room for."""
        return self._num_sessions(self._prefetchable_bytes)

    @property
    def eviction_window(self) -> int:
        """(C_mem + C_disk) / S_kv, those that memory and disk have room for."""
        return self._num_sessions(self._prefetchable_bytes + self._disk_bytes)

    def wanted_free_bytes(self, free_bytes: int) -> int:
        """How much host memory the background should make free, of which so much is.

        The reserve; once it is touched `PlacementConfig.refill` of it on top.
        """
        if free_bytes < self.reserve_bytes:
            self._is_refilling = True
        elif free_bytes >= self._refilled_bytes:
            self._is_refilling = False
        return self._refilled_bytes if self._is_refilling else self.reserve_bytes

    @property
    def _prefetchable_bytes(self) -> int:
        """C_mem, the memory that fetches may use."""
        return max(0, self._host_bytes - self.reserve_bytes - self.running_host_bytes)

    def _num_sessions(self, num_bytes: int) -> int:
        mean = self.stored_kv_bytes / max(1, self.num_stored)
        return int(num_bytes / max(1.0, mean))
