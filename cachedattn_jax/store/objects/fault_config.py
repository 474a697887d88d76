"""Which faults are injected under the tiers, and how often. Knows no store."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import no_type_check

READ_FAULTS = ("error", "latency", "hang", "short_read", "bit_flip", "permission")
WRITE_FAULTS = ("error", "latency", "hang", "disk_full", "permission", "torn_write")
HOST_FAULTS = ("host_error",)
FAULTS = tuple(dict.fromkeys((*READ_FAULTS, *WRITE_FAULTS, *HOST_FAULTS)))


@no_type_check  # gin passes what users write; checked here in words of ours
@dataclass(frozen=True, kw_only=True)
class FaultConfig:
    """Faults drawn at random, the same for the same seed and order of operations.

    Attributes:
        rate: share of operations that a fault strikes.
        kinds: some of `FAULTS`; each operation draws among those that fit it.
        latency_s: of the kind latency; the operation works.
        hang_s: of the kind hang; half of the writes were done before.
    """

    rate: float
    kinds: Sequence[str] = FAULTS
    seed: int = 0
    latency_s: float = 0.02
    hang_s: float = 60.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", tuple(self.kinds))
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate={self.rate!r} must lie from 0 to 1")
        for kind in self.kinds:
            if kind not in FAULTS:
                raise ValueError(f"fault {kind!r} is not one of {', '.join(FAULTS)}")
        for name in ("latency_s", "hang_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be seconds from 0"
                )
