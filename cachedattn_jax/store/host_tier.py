"""Pinned host memory for pages, in slabs, under a byte budget.

Knows slabs and bytes. Does not know which page a row holds.
"""

from dataclasses import dataclass, field

import jax

from cachedattn_jax.store.link import Copy


@dataclass(eq=False, kw_only=True)
class Slab:
    """A run of pages that left the device together.

    Attributes:
        num_bytes: of all its groups, whether they are here already or not.
        groups: per layer group, [rows, layers_per_group, kv_heads, 2, page_tokens,
            dim]; those of a run that leaves group by group come one after the other.
        copies: for each of them, the copy that brought it or brings it.
        rows_left: rows still in use; the memory goes when the last one leaves.
        is_broken: whether a copy of it failed, so that no page may use it.
    """

    num_rows: int
    num_bytes: int
    rows_left: int
    groups: list[jax.Array] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    is_broken: bool = False


class HostTier:
    """A budget that slabs are charged to until their last row leaves."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0

    def has_room(self, num_bytes: int) -> bool:
        return self.used_bytes + num_bytes <= self.capacity_bytes

    def reserve(self, num_rows: int, num_bytes: int) -> Slab:
        """Charges a slab, still empty, whose room the caller has made."""
        assert self.has_room(num_bytes), (self.used_bytes, num_bytes)
        self.used_bytes += num_bytes
        return Slab(num_rows=num_rows, num_bytes=num_bytes, rows_left=num_rows)

    def release_row(self, slab: Slab) -> None:
        """One page of the slab is needed no more."""
        slab.rows_left -= 1
        if slab.rows_left == 0:
            self.used_bytes -= slab.num_bytes
            slab.groups.clear()
            slab.copies.clear()
