"""The pages one running turn uses: its slots, and what must still be copied into them.

Knows slots and runs. Does not know why a page is where it is.
"""

from dataclasses import dataclass, field

import numpy as np

from cachedattn_jax.store.inbound import Inbound
from cachedattn_jax.store.page_index import PageEntry
from cachedattn_jax.store.placement.tier import Tier


@dataclass(eq=False, kw_only=True)
class Lease:
    """What a turn holds from its start to its end.

    Attributes:
        session: the session whose turn it is.
        slots: int32 [pages], the page table of the turn, whole from the start.
        entries: the indexed page behind each slot, None where the slot is the turn's
            own.
        cached_tokens: tokens of the prompt whose keys and values need no computing.
        tokens_from: the same by the tier they came from.
        inbound: what must be installed before they can be used, on its way.
        dropped: pages that the turn needs no more and other turns use; held, since
            programs of this turn that read them may not be dispatched yet.
    """

    session: str
    slots: np.ndarray
    entries: list[PageEntry | None]
    cached_tokens: int
    tokens_from: dict[Tier, int]
    inbound: Inbound
    dropped: list[PageEntry] = field(default_factory=list)
