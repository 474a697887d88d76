"""How the store talks to a disk or an object store, and when it gives up on it."""

from dataclasses import dataclass
from typing import no_type_check

from cachedattn_jax.store.byte_count import parse_bytes
from cachedattn_jax.store.objects.fault_config import FaultConfig

_POSITIVE = ("timeout_s", "breaker_rest_s")


@no_type_check  # gin passes what users write; checked here in words of ours
@dataclass(frozen=True, kw_only=True)
class IoConfig:
    """Limits of reading and writing under the disk tier.

    Attributes:
        timeout_s: an operation that takes longer has failed.
        breaker_failures: after so many failures in a row nothing is tried for
            `breaker_rest_s`: stored pages are misses at once, new ones stay in memory.
        max_retries: of a request to an object store, with delays from 50 ms to 1 s.
        write_backlog_bytes: of pages that are being written; what comes beyond waits.
        is_synced: whether a write counts only when the device has it. Without, what was
            written survives the death of the process, and not that of the machine;
            what a power cut tears is found by its checksum.
        s3_endpoint, s3_region: of servers other than AWS; None for what the environment
            says (AWS_ENDPOINT_URL, AWS_REGION).
        faults: injected into the tiers below the device, for tests.
    """

    timeout_s: float = 10.0
    breaker_failures: int = 5
    breaker_rest_s: float = 2.0
    max_retries: int = 3
    write_backlog_bytes: int | str = "256 MiB"
    is_synced: bool = False
    s3_endpoint: str | None = None
    s3_region: str | None = None
    faults: FaultConfig | None = None

    def __post_init__(self) -> None:
        num_bytes = parse_bytes("write_backlog_bytes", self.write_backlog_bytes)
        object.__setattr__(self, "write_backlog_bytes", num_bytes)
        for name in _POSITIVE:
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"{name}={value!r} must be seconds above 0")
        for name, least in (("breaker_failures", 1), ("max_retries", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(
                    f"{name}={value!r} must be a whole number from {least} on"
                )
        if not isinstance(self.faults, FaultConfig | None):
            raise ValueError(f"faults={self.faults!r} must be a FaultConfig or None")

    @property
    def num_backlog_bytes(self) -> int:
        return int(self.write_backlog_bytes)
