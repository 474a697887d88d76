"""A turn on its way through a replica. Knows no replica."""

from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Turn:
    """One turn on its way through a replica.

    Attributes:
        row: in the columns of the results.
        place: in its session, from 0.
        ready_at: when enough of the pages that it waits for have come from disk.
        disk_s: how long reading them takes in all.
        loads_from_s: since when its pages travel.
        mask: pages that it reuses.
    """

    session: int
    row: int
    place: int
    new_tokens: int
    output_tokens: int
    arrived_s: float
    ticket: int = 0
    mask: int = 0
    ready_at: float = 0.0
    disk_s: float = 0.0
    loads_from_s: float = 0.0
    staged_s: float = 0.0
    prompt_tokens: int = 0
    num_slots: int = 0
    num_passed: int = 0
    is_staged: bool = False
