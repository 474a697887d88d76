"""Pinned host memory for pages, in slabs, under a byte budget.

Knows slabs and bytes. Does not know which page a row holds.
"""

from dataclasses import dataclass

import jax


@dataclass(eq=False, kw_only=True)
class Slab:
    """A run of pages that left the device together.

    Attributes:
        groups: per layer group, [rows, layers_per_group, kv_heads, 2, page_tokens,
            dim].
        rows_left: rows still in use; the memory goes when the last one leaves.
    """

    groups: list[jax.Array]
    num_rows: int
    rows_left: int

    @property
    def num_bytes(self) -> int:
        return sum(group.nbytes for group in self.groups)


class HostTier:
    """A budget that slabs are charged to until their last row leaves."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0

    def has_room(self, num_bytes: int) -> bool:
        return self.used_bytes + num_bytes <= self.capacity_bytes

    def admit(self, groups: list[jax.Array]) -> Slab:
        """Charges a slab whose room the caller has made."""
        num_rows = groups[0].shape[0]
        slab = Slab(groups=groups, num_rows=num_rows, rows_left=num_rows)
        assert self.has_room(slab.num_bytes), (self.used_bytes, slab.num_bytes)
        self.used_bytes += slab.num_bytes
        return slab

    def release_row(self, slab: Slab) -> None:
        """One page of the slab is needed no more."""
        slab.rows_left -= 1
        if slab.rows_left == 0:
            self.used_bytes -= slab.num_bytes
            slab.groups.clear()
