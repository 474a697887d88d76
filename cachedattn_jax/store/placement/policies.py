"""Every policy by its name."""

import difflib
from collections.abc import Callable

from cachedattn_jax.store.placement.belady import FarthestReturn
from cachedattn_jax.store.placement.look_ahead import LookAhead
from cachedattn_jax.store.placement.policy import Policy
from cachedattn_jax.store.placement.predictive import BestValue
from cachedattn_jax.store.placement.recency import FIFO, LRU

POLICIES: dict[str, Callable[[float], Policy]] = {
    "lookahead": lambda token_weight: LookAhead(LRU()),
    "predictive": lambda token_weight: LookAhead(BestValue(token_weight)),
    "lru": lambda token_weight: LRU(),
    "fifo": lambda token_weight: FIFO(),
    "fifo_by_age": lambda token_weight: FIFO(by_age=True),
    "belady": lambda token_weight: LookAhead(FarthestReturn()),
}


def check_name(name: str) -> None:
    """Raises ValueError, with the nearest name, unless a policy has this name."""
    if name not in POLICIES:
        nearest = difflib.get_close_matches(str(name), POLICIES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"policy={name!r} is unknown; did you mean {nearest!r}?"
            f" Known: {', '.join(POLICIES)}"
        )


def policy(name: str, token_weight: float = 0.0) -> Policy:
    """A fresh policy by its name; ValueError names the nearest one known."""
    check_name(name)
    return POLICIES[name](token_weight)
