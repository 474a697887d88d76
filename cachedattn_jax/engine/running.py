"""The turns that run: their seats, and the programs whose tokens are on their way.

Knows who is where. Does not know what a turn does next.
"""

from collections import deque

from cachedattn_jax.engine.job import InFlight, Job
from cachedattn_jax.engine.turn import Turn


class Running:
    """At most `max_batch` jobs, one of which may be in its prefill.

    Attributes:
        prefilling: the job whose prefill is not wholly dispatched, if there is one.
        decoding: jobs whose prefill is dispatched.
        in_flight: dispatched programs whose tokens were not read, oldest first.
        blocked: the next turn, while it waits for slots that running turns hold: trying
            again before one of them ends would drain the device for nothing.
    """

    def __init__(self, max_batch: int) -> None:
        self.prefilling: Job | None = None
        self.decoding: list[Job] = []
        self.in_flight: deque[InFlight] = deque()
        self.blocked: Turn | None = None
        self.free_seats = list(range(max_batch))

    @property
    def jobs(self) -> list[Job]:
        return [*self.decoding, *filter(None, [self.prefilling])]

    @property
    def needs_tokens(self) -> bool:
        """Whether another decode step will follow."""
        return any(job.needs_tokens and not job.is_paused for job in self.decoding)

    @property
    def ready(self) -> list[Job]:
        """Jobs whose next token can be computed."""
        return [job for job in self.advancing if not job.is_paused]

    @property
    def advancing(self) -> list[Job]:
        """Those, and jobs that can go on as soon as slots are free."""
        return [j for j in self.decoding if j.needs_tokens and not j.is_overflowed]

    @property
    def paused(self) -> list[Job]:
        """Jobs that wait for slots that a truncation needs."""
        return [job for job in self.decoding if job.is_paused]

    @property
    def overflowed(self) -> Job | None:
        """A job that waits for a prefill of what a truncation left."""
        return next((job for job in self.decoding if job.is_overflowed), None)

    def may_start(self, turn: Turn | None) -> bool:
        """Whether the next turn may start: what gets free may be for one that runs."""
        has_needy = self.prefilling or self.overflowed or self.paused
        return turn is not self.blocked and not has_needy

    def start(self, job: Job) -> None:
        """Gives a job a seat; its prefill is next."""
        job.seat = self.free_seats.pop()
        self.prefilling = job

    def prefill_again(self, job: Job) -> None:
        """Takes a job out of the batch for another prefill."""
        job.is_overflowed = False
        self.decoding.remove(job)
        self.prefilling = job

    def decode(self, job: Job) -> None:
        """Notes that a job's prefill is dispatched."""
        self.prefilling = None
        self.decoding.append(job)

    def leave(self, job: Job) -> None:
        """Takes a job out, wherever it is; what it holds may let the next one start."""
        self.blocked = None
        if job.seat is not None:
            self.free_seats.append(job.seat)
            job.seat = None
        if job is self.prefilling:
            self.prefilling = None
        if job in self.decoding:
            self.decoding.remove(job)
