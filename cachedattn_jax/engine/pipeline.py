"""The schedule of a layer-wise prefill, in the abstract. Pure: knows seconds only.

Layer groups pass one link (host to device) and then one device, each in group order.
All seconds count from the start of the prefill. The rules of `read_ahead`, the number
of groups that may be in flight or wait in the read buffer:

- Before the prefill only the first `read_ahead` groups may be on their way, and the
  link may work for them for `lead_s` seconds.
- From then on the copy of group g may start once the compute of group
  g - max(1, read_ahead) has started.
- The compute of g starts after its own copy and after the compute of g - 1.

Layer-wise pre-loading of the paper, section 3.2.1 and figure 19.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Slot:
    """When one layer group is copied and computed, in seconds from the start.

    Copies that the lead hides have negative times.
    """

    load_start_s: float
    load_end_s: float
    compute_start_s: float
    compute_end_s: float


def schedule(
    load_s: Sequence[float],
    compute_s: Sequence[float],
    *,
    read_ahead: int,
    lead_s: float = math.inf,
) -> list[Slot]:
    """The schedule that ends first.

    Args:
        load_s: seconds on the link, by group.
        compute_s: seconds on the device, by group.
        read_ahead: groups in flight or in the read buffer. 0 has nothing on its way
            before the start and loads the next group while one computes.
        lead_s: seconds that the link may work before the start; infinite where all
            `read_ahead` groups have arrived at the start.

    Raises:
        ValueError: lengths differ, or a number is negative or not a number.
    """
    _check(load_s, compute_s, read_ahead, lead_s)
    early = min(read_ahead, len(load_s))
    window = max(1, read_ahead)
    slots: list[Slot] = []
    # A longer lead than these copies take would only let the link rest before 0.
    load_end = 0.0 - min(lead_s, sum(load_s[:early], 0.0))
    compute_end = 0.0
    # Every start is a maximum of earlier ends and starts, so delaying one never brings
    # another one forward: as early as allowed is optimal.
    for group, (load, compute) in enumerate(zip(load_s, compute_s, strict=True)):
        load_start = load_end
        if group >= window:
            load_start = max(load_start, slots[group - window].compute_start_s)
        load_end = load_start + load
        compute_start = max(compute_end, load_end)
        compute_end = compute_start + compute
        slots.append(
            Slot(
                load_start_s=load_start,
                load_end_s=load_end,
                compute_start_s=compute_start,
                compute_end_s=compute_end,
            )
        )
    return slots


def least_finish_s(
    load_s: Sequence[float],
    compute_s: Sequence[float],
    *,
    read_ahead: int,
    lead_s: float = math.inf,
) -> float:
    """Seconds from the start to the end of the last compute; see `schedule`."""
    slots = schedule(load_s, compute_s, read_ahead=read_ahead, lead_s=lead_s)
    return max((slot.compute_end_s for slot in slots), default=0.0)


def equal_groups_finish_s(
    load_s: np.ndarray | float,
    compute_s: np.ndarray | float,
    *,
    num_groups: int,
    read_ahead: int,
    lead_s: float = math.inf,
) -> np.ndarray:
    """`least_finish_s` of equal groups for many cases at once, in closed form.

    Args:
        load_s: seconds on the link of one group, by case.
        compute_s: seconds on the device of one group, by case.
    """
    load_s, compute_s = np.asarray(load_s), np.asarray(compute_s)
    early_s = np.minimum(lead_s, min(read_ahead, num_groups) * load_s)
    # The finish is the longest chain of waits. With equal groups it is one of three:
    # all computes; the first copy, then all computes; all copies, then the last
    # compute. A chain that waits for the window exchanges some of these steps for
    # fewer ones and is never longer.
    slower = np.maximum(load_s, compute_s)
    last = load_s + (num_groups - 1) * slower + compute_s - early_s
    return np.asarray(np.maximum(num_groups * compute_s, last))


def no_preload_s(load_s: Sequence[float], compute_s: Sequence[float]) -> float:
    """Seconds where everything is loaded and then everything computes (NO-PL)."""
    return sum(load_s, 0.0) + sum(compute_s, 0.0)


def exposed_stall_s(
    arrivals_s: Sequence[float], compute_ends_s: Sequence[float], started_s: float
) -> float:
    """Seconds that the compute waited for copies, all on one clock.

    Args:
        arrivals_s: when the copy of each group ended.
        compute_ends_s: when the compute of each group ended.
        started_s: when the compute of the first group could have started.

    Raises:
        ValueError: lengths differ.
    """
    if len(arrivals_s) != len(compute_ends_s):
        raise ValueError(
            f"{len(arrivals_s)} arrivals do not go with {len(compute_ends_s)} computes"
        )
    frees = [started_s, *compute_ends_s[:-1]]
    waits = [
        max(0.0, arrival - max(started_s, free))
        for arrival, free in zip(arrivals_s, frees, strict=False)
    ]
    return sum(waits, 0.0)


def read_buffer_groups(
    load_s_per_group: float, compute_s_per_group: float, num_groups: int
) -> int:
    """The least `read_ahead` with which equal groups never wait, 1 to `num_groups`.

    That is the paper's S_buf = B (T_load L_hist - T_pref L_new), section 3.2.1, in
    layer groups, but for one thing. The paper wants the copies to end with the last
    compute, which gives ceil((loads - computes) / load). They must end before the last
    compute starts, so one compute less hides copies:
    ceil((loads - computes + compute) / load), in some cases one group more.

    Args:
        load_s_per_group: seconds on the link.
        compute_s_per_group: seconds on the device.

    Raises:
        ValueError: a number is negative, or there is no group.
    """
    _check([load_s_per_group], [compute_s_per_group], 0, 0.0)
    if num_groups < 1:
        raise ValueError(f"num_groups={num_groups} must be at least 1")
    if load_s_per_group <= compute_s_per_group:
        return 1
    hidden = (num_groups - 1) * (compute_s_per_group / load_s_per_group)
    # Not a group more for the last bit of a division.
    return max(1, math.ceil(num_groups - hidden - 1e-12))


def _check(
    load_s: Sequence[float], compute_s: Sequence[float], read_ahead: int, lead_s: float
) -> None:
    if len(load_s) != len(compute_s):
        raise ValueError(
            f"{len(load_s)} loads do not go with {len(compute_s)} computes"
        )
    if not all(0 <= seconds < math.inf for seconds in (*load_s, *compute_s)):
        raise ValueError("seconds of loads and computes must be finite, 0 or more")
    if read_ahead < 0 or not lead_s >= 0:
        raise ValueError(
            f"read_ahead={read_ahead} and lead_s={lead_s} must not be negative"
        )
