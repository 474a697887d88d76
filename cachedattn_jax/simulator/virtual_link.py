"""Connections between two memories in virtual time. Knows bytes and seconds."""

from cachedattn_jax.engine.cost_constants import Constants, Link


class VirtualLink:
    """Carries one copy after the other at full speed.

    Copies that share a link's bandwidth end, all together, when they would end one
    after the other; here the first in line is not held up by those behind it.

    Attributes:
        free_at: when all copies until now have ended.
        num_bytes: carried until then.
    """

    def __init__(self, link: Link | None) -> None:
        self._link = link
        self.free_at = 0.0
        self.num_bytes = 0.0

    @property
    def exists(self) -> bool:
        return self._link is not None

    def carry(self, num_bytes: int | float, now: float) -> float:
        """Queues a copy; returns when it has arrived."""
        if self._link is None:
            raise ValueError("there is no such link")
        start = self.free_at if self.free_at > now else now
        self.free_at = start + self._link.latency_s + num_bytes / self._link.bytes_per_s
        self.num_bytes += num_bytes
        return self.free_at


class VirtualLinks:
    """All connections of one replica, each way its own."""

    def __init__(self, constants: Constants) -> None:
        self.to_device = VirtualLink(constants.host_to_device)
        self.to_host = VirtualLink(constants.device_to_host)
        self.from_disk = VirtualLink(constants.disk_read)
        self.to_disk = VirtualLink(constants.disk_write)

    def num_bytes(self) -> dict[str, float]:
        """Bytes carried, by link."""
        return {name: link.num_bytes for name, link in vars(self).items()}
