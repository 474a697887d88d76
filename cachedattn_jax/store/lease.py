"""The pages one running turn uses: its slots, and what must still be copied into them.

Knows slots and runs. Does not know why a page is where it is.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cachedattn_jax.store.inbound import Inbound
from cachedattn_jax.store.page import Tail
from cachedattn_jax.store.page_index import PageEntry
from cachedattn_jax.store.placement.tier import TIERS, Tier


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


def tokens_by_tier(
    found: Sequence[PageEntry], tail: Tail | None, page_tokens: int
) -> dict[Tier, int]:
    """Tokens of stored pages by the fastest tier that each lies in.

    Args:
        tail: the last of the pages, or one that is not among them.
    """
    num_pages = Counter([entry.nearest for entry in found])
    tokens = {tier: page_tokens * num_pages[tier] for tier in TIERS}
    if tail is not None and found and found[-1].key == tail.key:
        tier = found[-1].nearest
        assert tier is not None
        tokens[tier] += len(tail.token_ids) - page_tokens
    return tokens
