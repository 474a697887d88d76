"""What placement knows of one conversation. Knows no policy."""

from collections.abc import Hashable
from dataclasses import dataclass, field

from cachedattn_jax.store.placement.tier import Tier

# The store's names are text, the simulator's are numbers.
Session = Hashable


@dataclass(slots=True, eq=False)
class Standing:
    """A conversation as placement sees it.

    Attributes:
        born: its place among all conversations, by when they were first seen.
        num_turns: finished turns.
        num_tokens: tokens whose keys and values are stored, or were.
        kv_bytes: size of its whole cache, stored or not.
        used_at: when its last turn began or ended.
        returns_at: when its next turn will come; only an oracle can say.
        tickets: places in the queue of its waiting turns, soonest first.
        num_bytes: bytes in each tier; a tier without any is not in it.
        entered: for the same tiers, a number that grows with every entry, where the
            policy is FIFO.
        disk_only_bytes: of those on disk, bytes in no faster tier.
        num_running: turns that run now.
        kind: what `predictive` takes it for; None where that is to be found out again.
    """

    session: Session
    born: int
    tenant: str = ""
    num_turns: int = 0
    num_tokens: int = 0
    kv_bytes: int = 0
    used_at: float = 0.0
    returns_at: float | None = None
    tickets: tuple[int, ...] = ()
    num_bytes: dict[Tier, int] = field(default_factory=dict)
    entered: dict[Tier, int] = field(default_factory=dict)
    disk_only_bytes: int = 0
    num_running: int = 0
    kind: int | None = None
    is_closed: bool = False
    is_pinned: bool = False

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for it."""
        return not self.tickets and not self.num_running

    @property
    def is_stored(self) -> bool:
        """Whether any of it lies below the device."""
        return Tier.HOST in self.num_bytes or Tier.DISK in self.num_bytes
