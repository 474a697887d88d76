"""Pages of one session in virtual time: bits of a number, one for each tier.

Knows where pages lie. Does not know budgets or other sessions.
"""

from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Pages:
    """Pages of one session.

    Attributes:
        num_tokens: tokens of the conversation, the last of which was sampled and has no
            keys and values yet.
        num_dropped: tokens that truncations took from its front.
        device, host, disk: bit i is set where page i lies in the tier.
        arriving, arrives_at: pages that are on their way from disk to host memory.
        holds: turns that need it to stay where it is.
        is_stale: whether positions baked into its keys are not those it has now.
    """

    session: int
    num_tokens: int = 0
    num_dropped: int = 0
    device: int = 0
    host: int = 0
    disk: int = 0
    arriving: int = 0
    arrives_at: float = 0.0
    holds: int = 0
    is_stale: bool = False

    @property
    def stored(self) -> int:
        return self.device | self.host | self.disk

    def arrive(self, now: float) -> None:
        """Notes pages that have come from disk by now."""
        if self.arriving and self.arrives_at <= now:
            self.arriving = 0


def first_pages(mask: int) -> int:
    """How many pages lie in `mask` without a gap, from page 0 on."""
    return (~mask & (mask + 1)).bit_length() - 1


def last_pages(mask: int, num: int) -> int:
    """The `num` last pages of a mask."""
    if num >= mask.bit_count():
        return mask
    if not mask & (mask + (mask & -mask)):  # without a gap, as nearly always
        num_others = mask.bit_length() - num
        return mask >> num_others << num_others
    found = 0
    for _ in range(num):
        bit = 1 << (mask.bit_length() - 1)
        found |= bit
        mask ^= bit
    return found
