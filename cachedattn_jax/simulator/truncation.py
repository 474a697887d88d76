"""What happens when a window is full, in virtual time: section 3.4 of the paper.

Knows windows and pages. Does not know queues.
"""

from cachedattn_jax.engine.cost_model import CostModel
from cachedattn_jax.engine.truncation import pages_to_drop
from cachedattn_jax.simulator.pages import Pages
from cachedattn_jax.simulator.results import Busy
from cachedattn_jax.simulator.simulated_store import SimulatedStore
from cachedattn_jax.simulator.system import System
from cachedattn_jax.simulator.turn import Turn


class Truncation:
    """Drops the front of conversations that outgrow the window."""

    def __init__(
        self, system: System, store: SimulatedStore, cost_model: CostModel, busy: Busy
    ) -> None:
        self._system = system
        self._store = store
        self._cost_model = cost_model
        self._busy = busy

    def before(self, turn: Turn, pages: Pages) -> None:
        """Makes room in the window for the prompt, and a token of the reply."""
        window = self._system.model.window
        if pages.num_tokens + turn.new_tokens < window:
            return
        while pages.num_tokens + turn.new_tokens >= window and pages.num_tokens:
            self._truncate(pages)
        turn.new_tokens = min(turn.new_tokens, window - 1)

    def after(self, pages: Pages) -> None:
        """Makes room in the window for a reply that ran past it."""
        system = self._system
        if pages.num_tokens <= system.model.window:
            return
        while pages.num_tokens > system.model.window:
            self._truncate(pages)
        if system.reuse == "recompute" or system.overflow == "invalidate":
            # What remains is computed anew before the reply goes on.
            seconds = self._cost_model.prefill_s(max(1, pages.num_tokens), 0)
            self._busy.overflow_s += seconds

    def _truncate(self, pages: Pages) -> None:
        system = self._system
        dropped = max(1, int(system.truncation_ratio * system.model.window))
        size = system.tokens_per_page
        if system.overflow == "invalidate":
            pages.is_stale = True
        elif system.allocation == "held":
            dropped = pages_to_drop(system.model.window, size, system.truncation_ratio)
            dropped *= size
            self._store.shift(pages, dropped // size)
        pages.num_tokens = max(0, pages.num_tokens - dropped)
        pages.num_dropped += dropped
