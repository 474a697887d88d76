"""Turns that wait and have been looked up: their pages travel, their slots are kept.

Knows pages and links, as `engine.staging` does. Does not know which turn is next.
"""

from cachedattn_jax.engine.cost_model import CostModel
from cachedattn_jax.engine.pipeline import read_buffer_groups
from cachedattn_jax.simulator.pages import Pages
from cachedattn_jax.simulator.simulated_store import SimulatedStore
from cachedattn_jax.simulator.system import System
from cachedattn_jax.simulator.truncation import Truncation
from cachedattn_jax.simulator.turn import Turn

# Tokens of a conversation, and those dropped from its front: two that agree mean the
# same pages.
History = tuple[int, int]


class SimulatedStaging:
    """Waiting turns whose pages are on their way.

    Args:
        histories: of sessions that other replicas serve too; see `Replica`.
    """

    def __init__(
        self,
        system: System,
        store: SimulatedStore,
        truncation: Truncation,
        cost_model: CostModel,
        histories: dict[int, History] | None,
    ) -> None:
        self._system = system
        self._store = store
        self._truncation = truncation
        self._cost_model = cost_model
        self._histories = histories
        self._staged: dict[Turn, None] = {}

    def stage(self, turn: Turn, now: float) -> bool:
        """Looks up what is stored of a turn and begins to read it from disk.

        Returns:
            Whether there were slots for it.
        """
        system, store = self._system, self._store
        pages = store.index.find(turn.session)
        if self._histories is not None:
            store.catch_up(pages, *self._histories.get(turn.session, (0, 0)))
        self._truncation.before(turn, pages)
        turn.prompt_tokens = pages.num_tokens + turn.new_tokens
        pages.arrive(now)
        mask = 0 if system.reuse == "recompute" else store.reusable(pages)
        if pages.is_stale:
            # As in the paper, every session is saved; that what is stored is of no use
            # shows when it is needed.
            store.drop(pages)
            mask, pages.is_stale = 0, False
        if system.is_deciding and mask:
            mask = self._decided(turn, pages, mask)
        pages.holds += 1
        if system.keeps_on_device:
            missing = num_pages(turn, system) - (mask & pages.device).bit_count()
            if not store.free_slots(missing, now):
                pages.holds -= 1
                return False
            turn.num_slots = missing
            store.reserve_slots(missing)
        turn.mask, turn.is_staged, turn.staged_s = mask, True, now
        if not system.max_staged:
            turn.loads_from_s = now
        from_disk = mask & pages.disk & ~(pages.host | pages.device)
        if mask & pages.arriving:
            turn.ready_at = pages.arrives_at
        if from_disk:
            self._read(turn, pages, from_disk, now)
        if turn.ready_at > now:
            self._staged[turn] = None
        return True

    def give_back(self) -> bool:
        """Whether waiting turns gave back slots."""
        staged, self._staged = self._staged, {}
        for turn in staged:
            self._store.release_slots(turn.num_slots)
            self._store.index.find(turn.session).holds -= 1
            turn.is_staged, turn.num_slots, turn.ready_at = False, 0, 0.0
        return bool(staged)

    def start(self, turn: Turn) -> None:
        """The turn's prefill begins: it waits no more."""
        self._staged.pop(turn, None)

    def ready_at(self, now: float) -> float | None:
        """When the next of them that waits for its pages has them."""
        ready = [turn.ready_at for turn in self._staged if turn.ready_at > now]
        return min(ready, default=None)

    def _read(self, turn: Turn, pages: Pages, mask: int, now: float) -> None:
        """Reads pages from disk; the turn may begin when enough groups have come."""
        system, store = self._system, self._store
        begins = max(now, store.links.from_disk.free_at)
        num_bytes = store.index.num_bytes(pages, mask.bit_count())
        turn.disk_s = store.links.from_disk.carry(num_bytes, now) - begins
        turn.loads_from_s = begins
        cached = turn.mask.bit_count() * system.tokens_per_page
        num_new = max(1, turn.prompt_tokens - cached)
        compute_s = self._cost_model.prefill_s(num_new, max(0, cached))
        groups = system.groups
        ahead = read_buffer_groups(turn.disk_s / groups, compute_s / groups, groups)
        ready_at = begins + turn.disk_s * ahead / groups
        turn.ready_at = max(turn.ready_at, ready_at)

    def _decided(self, turn: Turn, pages: Pages, mask: int) -> int:
        """What of the stored beginning is worth loading."""
        size, num = self._system.tokens_per_page, mask.bit_count()
        sources = []
        for page in range(num):
            bit = 1 << page
            is_near = pages.host & bit and not pages.arriving & bit
            near = "host" if is_near else "disk"
            sources.append("device" if pages.device & bit else near)
        tail = (pages.num_tokens - 1) % size
        is_tail = num * size > pages.num_tokens - 1
        decision = self._cost_model.decide(
            sources, turn.prompt_tokens, tail_tokens=tail if is_tail else 0
        )
        return (1 << decision.num_pages) - 1


def num_pages(turn: Turn, system: System) -> int:
    """Pages that the turn may grow to; a reply past the window truncates it."""
    num_tokens = turn.prompt_tokens + turn.output_tokens
    num_pages = -(-num_tokens // system.tokens_per_page)
    return min(num_pages, system.window_pages)
