"""What becomes of the stored beginning of a prompt, and why. Pure: knows no costs."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Choice = Literal[
    "load", "recompute", "load_prefix", "nothing_stored", "resident", "not_measured"
]
# Finishes this near to the best count as equal: the one that computes least is chosen,
# since other sequences need the device.
_TIE = 1.02


@dataclass(frozen=True, kw_only=True)
class Decision:
    """How many of the stored pages to use, from the beginning of the prompt.

    The seconds last from the start of the prefill to its end, and are None where
    nothing was measured.

    Attributes:
        reason: one short sentence with the numbers.
        load_s: with all stored pages used.
        recompute_s: with nothing loaded; pages at the beginning that lie on the device
            are used.
        expected_s: with `num_pages` used.
    """

    num_pages: int
    choice: Choice
    reason: str
    load_s: float | None = None
    recompute_s: float | None = None
    expected_s: float | None = None

    @classmethod
    def forced(cls, loading: str, num_pages: int) -> "Decision":
        """What a setting decides, "always" or "never" to load."""
        choice: Choice = "load" if loading == "always" else "recompute"
        return cls(num_pages=num_pages, choice=choice, reason=f"loading is {loading!r}")

    @classmethod
    def kept(cls, num_pages: int) -> "Decision":
        """Pages are kept across a truncation: fewer of them would not do."""
        reason = "load all: what was dropped would have to be computed again, too"
        return cls(num_pages=num_pages, choice="load", reason=reason)


def best_decision(
    num_pages: int, loaded: np.ndarray, finish: np.ndarray | None
) -> Decision:
    """Decides by the pages to load and the seconds, each by number of pages used."""
    chosen, load_s, recompute_s, expected_s = num_pages, None, None, None
    if finish is not None:
        if loaded[-1]:
            chosen = int(np.flatnonzero(finish <= _TIE * finish.min())[-1])
        unloaded = np.flatnonzero(loaded == 0)[-1]
        load_s, recompute_s = float(finish[-1]), float(finish[unloaded])
        expected_s = float(finish[chosen])
    loads, computes = _ms(load_s), _ms(recompute_s)
    if not num_pages:
        choice, reason = "nothing_stored", "no page is stored"
    elif not loaded[-1]:
        choice, reason = "resident", f"all {num_pages} pages are on the device"
    elif finish is None:
        choice, reason = (
            "not_measured",
            "load all: no speeds to decide by were measured",
        )
    elif chosen == num_pages:
        choice, reason = "load", f"load all: {loads} against {computes} to recompute"
    elif loaded[chosen]:
        choice = "load_prefix"
        reason = f"load {chosen} of {num_pages} pages: {_ms(expected_s)} against"
        reason += f" {loads} to load all and {computes} to recompute"
    else:
        choice = "recompute"
        reason = f"recompute: {_ms(expected_s)} against {loads} to load all"
    return Decision(
        num_pages=chosen,
        choice=choice,
        reason=reason,
        load_s=load_s,
        recompute_s=recompute_s,
        expected_s=expected_s,
    )


def _ms(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{1e3 * seconds:.1f} ms"
