"""What was measured of a model on a machine, and how it is written down.

Pure: knows seconds and bytes. Does not know how they are measured or used.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Link:
    """One direction between two memories.

    Attributes:
        latency_s: seconds of one copy of nothing.
        bytes_per_s: bandwidth, bytes per second.
    """

    latency_s: float
    bytes_per_s: float

    def __post_init__(self) -> None:
        _not_negative("latency_s", self.latency_s)
        if not 0 < self.bytes_per_s < math.inf:
            raise ValueError(f"bytes_per_s={self.bytes_per_s} must be above 0")

    def seconds(self, num_bytes: int) -> float:
        """Seconds of one copy; 0 where there is nothing to copy."""
        return self.latency_s + num_bytes / self.bytes_per_s if num_bytes else 0.0


@dataclass(frozen=True)
class ChunkCost:
    """Compute of one prefill program.

    Attributes:
        base_s: seconds, whatever the context.
        s_per_context_token: seconds more per token of context at the chunk's end.
    """

    base_s: float
    s_per_context_token: float

    def __post_init__(self) -> None:
        _not_negative("base_s", self.base_s)
        _not_negative("s_per_context_token", self.s_per_context_token)


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What was measured of one model on one machine.

    Attributes:
        disk_read, disk_write: None where there is no disk.
        prefill: by program size, in tokens.
        decode_step_s: seconds of one decode step.
    """

    host_to_device: Link
    device_to_host: Link
    disk_read: Link | None
    disk_write: Link | None
    prefill: Mapping[int, ChunkCost]
    decode_step_s: float

    def __post_init__(self) -> None:
        _not_negative("decode_step_s", self.decode_step_s)

    def describe(self) -> dict[str, object]:
        """Plain numbers under the names of the attributes, as JSON holds them."""
        links = {
            name: None if link is None else asdict(link)
            for name, link in self._links().items()
        }
        prefill = {str(size): asdict(cost) for size, cost in self.prefill.items()}
        return {**links, "prefill": prefill, "decode_step_s": self.decode_step_s}

    @classmethod
    def from_description(cls, description: Mapping[str, object]) -> "Constants":
        """What `describe` described; ValueError names what is missing or wrong."""
        try:
            found = dict(description)
            prefill = {
                int(size): ChunkCost(**_floats(cost))
                for size, cost in dict(found.pop("prefill")).items()  # type: ignore
            }
            decode_step_s = float(found.pop("decode_step_s"))  # type: ignore
            links = {
                name: None if link is None else Link(**_floats(link))
                for name, link in found.items()
            }
            if None in (links["host_to_device"], links["device_to_host"]):
                raise ValueError("only a disk may be missing")
            return cls(prefill=prefill, decode_step_s=decode_step_s, **links)  # type: ignore
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"no description of constants: {error}") from error

    def _links(self) -> dict[str, Link | None]:
        return {
            "host_to_device": self.host_to_device,
            "device_to_host": self.device_to_host,
            "disk_read": self.disk_read,
            "disk_write": self.disk_write,
        }


def _floats(numbers: object) -> dict[str, float]:
    return {name: float(number) for name, number in dict(numbers).items()}  # type: ignore


def _not_negative(name: str, number: float) -> None:
    if not 0 <= number < math.inf:
        raise ValueError(f"{name}={number} must be finite, 0 or more")
