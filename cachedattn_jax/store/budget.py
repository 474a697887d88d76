"""How much memory each tier may use, and which policy shares it out.

Knows budgets. Does not know arrays or pages; imports no jax.
"""

import os
import shutil
from dataclasses import dataclass, replace
from typing import no_type_check

from cachedattn_jax.store.byte_count import parse_bytes
from cachedattn_jax.store.layout import Layout
from cachedattn_jax.store.link import EmulatedLink
from cachedattn_jax.store.objects.io_config import IoConfig
from cachedattn_jax.store.placement.placement_config import PlacementConfig

# While a turn runs, its new pages leave the device so many at a time, or at its end.
SAVED_TOGETHER = 4
WRITE_POLICIES = ("write_through", "write_back", "write_through_selective")


@no_type_check  # gin passes what users write; checked here in words of ours
@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """Budgets of the tiers, in total and not per device.

    Attributes:
        device_bytes, host_bytes, disk_bytes: a number of bytes, or text such as "64
            GiB". 0 switches the host or the disk tier off.
        pinned_bytes: of host memory, taken from the machine when an engine warms up on
            an accelerator, because the first save that needs it would wait: page-
            locking 1 GiB took 2.5 s on an H100. None for all of `host_bytes`.
        disk_root: a path or a TensorStore URL (file://, s3://, gs://, memory://); None
            for no disk tier. One layout owns a root.
        cache_root, cache_bytes: a folder that keeps pages of an object store near by,
            a fourth tier; None for none.
        placement: who gives up room first, and what is fetched ahead.
        write_policy: when a new page is copied out of the device. "write_through": as
            soon as it is computed; "write_back": when its slot is needed;
            "write_through_selective": at once for sessions that have come back before,
            and when the slot is needed for all others.
        write_buffer_bytes: of device memory for pages that are being copied out. A turn
            that needs slots waits for a save only when so many are under way.
        is_saving_synchronous: every turn waits for its pages to be saved when it ends;
            the baseline of the paper's section 3.2.2.
        tenant_secret_file: a file whose content salts the page keys of every tenant;
            None where tenants trust each other.
        io: time-outs, retries and other limits of the disk tier.
        host_device_link, disk_host_link: emulated connections, for machines that have
            none to measure with; None for the real ones.
    """

    device_bytes: int | str = "256 MiB"
    host_bytes: int | str = "1 GiB"
    disk_bytes: int | str = 0
    pinned_bytes: int | str | None = None
    disk_root: str | None = None
    cache_root: str | None = None
    cache_bytes: int | str = 0
    placement: PlacementConfig = PlacementConfig()
    write_policy: str = "write_through"
    write_buffer_bytes: int | str = "512 MiB"
    is_saving_synchronous: bool = False
    tenant_secret_file: str | None = None
    io: IoConfig = IoConfig()
    host_device_link: EmulatedLink | None = None
    disk_host_link: EmulatedLink | None = None

    def __post_init__(self) -> None:
        names = ("device_bytes", "host_bytes", "disk_bytes", "cache_bytes")
        pinned = () if self.pinned_bytes is None else ("pinned_bytes",)
        for name in (*names, "write_buffer_bytes", *pinned):
            object.__setattr__(self, name, parse_bytes(name, getattr(self, name)))
        _check_memory("host_bytes", self.num_host_bytes)
        if self.num_disk_bytes and self.disk_root and "://" not in self.disk_root:
            _check_disk(self.disk_root, self.num_disk_bytes)
        if self.cache_root and self.num_cache_bytes:
            _check_disk(self.cache_root, self.num_cache_bytes)
        if not isinstance(self.placement, PlacementConfig):
            raise ValueError(f"placement={self.placement!r} must be a PlacementConfig")
        if self.write_policy not in WRITE_POLICIES:
            raise ValueError(
                f"write_policy={self.write_policy!r} is not one of"
                f" {', '.join(WRITE_POLICIES)}"
            )
        if not isinstance(self.io, IoConfig):
            raise ValueError(f"io={self.io!r} must be an IoConfig")
        for name in ("host_device_link", "disk_host_link"):
            link = getattr(self, name)
            if not isinstance(link, EmulatedLink | None):
                raise ValueError(f"{name}={link!r} must be an EmulatedLink or None")

    @property
    def num_device_bytes(self) -> int:
        return int(self.device_bytes)

    @property
    def num_host_bytes(self) -> int:
        return int(self.host_bytes)

    @property
    def num_pinned_bytes(self) -> int:
        if self.pinned_bytes is None:
            return self.num_host_bytes
        return min(int(self.pinned_bytes), self.num_host_bytes)

    @property
    def num_disk_bytes(self) -> int:
        return int(self.disk_bytes)

    @property
    def num_cache_bytes(self) -> int:
        return int(self.cache_bytes)

    @property
    def num_write_buffer_bytes(self) -> int:
        return int(self.write_buffer_bytes)

    def saves_meanwhile(self, num_turns: int) -> bool:
        """Whether a session's new pages leave the device while its turn runs."""
        return not self.is_saving_synchronous and self.saves_early(num_turns)

    def saves_early(self, num_turns: int) -> bool:
        """Whether the write policy copies a session's pages out before they must go."""
        match self.write_policy:
            case "write_through":
                return True
            case "write_through_selective":
                return num_turns > 0
            case _:
                return False

    @property
    def device_only(self) -> "StoreConfig":
        """The same without the lower tiers."""
        return replace(
            self, host_bytes=0, disk_bytes=0, disk_root=None, cache_root=None
        )

    def num_slots(self, layout: Layout) -> int:
        """Pages that fit in device memory."""
        return self.num_device_bytes // layout.page_bytes

    def check_window(self, layout: Layout, window: int) -> None:
        """ValueError if device memory cannot hold one context of so many tokens."""
        least = layout.num_pages(window)
        if self.num_slots(layout) < least:
            raise ValueError(
                f"device_bytes={self.num_device_bytes} holds {self.num_slots(layout)}"
                f" pages; one window of {window} tokens needs {least} pages,"
                f" {least * layout.page_bytes} bytes"
            )


def _check_memory(name: str, num_bytes: int) -> None:
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if num_bytes > physical:
        raise ValueError(
            f"{name}={num_bytes} is more than the {physical} bytes of memory here"
        )


def _check_disk(root: str, num_bytes: int) -> None:
    path = os.path.abspath(os.path.expanduser(root))
    while not os.path.exists(path):
        path = os.path.dirname(path)
    total = shutil.disk_usage(path).total
    if num_bytes > total:
        raise ValueError(
            f"disk_bytes={num_bytes} is more than the {total} bytes of the disk"
            f" that holds disk_root={root!r}"
        )
