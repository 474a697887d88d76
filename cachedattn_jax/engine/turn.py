"""One turn on its way through the engine, and what its user sees of it.

Knows tokens, times and where tokens came from. Does not know arrays or how it is run.
"""

import dataclasses
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from cachedattn_jax.engine.request import Request

FinishReason = Literal["stop", "length", "window", "cancelled", "error"]


@dataclass(frozen=True, kw_only=True)
class TokensFrom:
    """Where the keys and values of a prompt came from; the sum is the prompt.

    Attributes:
        recomputed: computed before in this session, lost or left, and computed again.
        new: never computed before in this session, the last sampled token included.
        dropped: left the context before, so that nothing was needed for them.
    """

    device: int = 0
    host: int = 0
    disk: int = 0
    recomputed: int = 0
    new: int = 0
    dropped: int = 0

    @property
    def cached(self) -> int:
        return self.device + self.host + self.disk

    @property
    def context(self) -> int:
        """Tokens that the model was given or had."""
        return self.cached + self.recomputed + self.new

    @property
    def total(self) -> int:
        return self.context + self.dropped


@dataclass(kw_only=True)
class Times:
    """Moments of a turn, seconds of one monotonic clock; None until they come.

    Attributes:
        started_s: the device was free for the turn; if its pages were not there yet, it
            waits for them from here on.
        first_token_s, finished_s: the token or the end became known to the host.
    """

    submitted_s: float
    started_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None


@dataclass(eq=False, kw_only=True)
class Turn:
    """A request, its reply so far, and its measurements.

    Attributes:
        prompt: int32, the whole conversation up to the reply, whatever left the context
            of the model; empty until the turn starts.
        reply: tokens received so far.
        margins: for each of them, best minus second best logit.
        stored: ends when the session's record is stored, and outlives the process from
            then on; see `Catalog.commit` for how it fails. None until the turn ends.
        error: what went wrong, if `finish_reason` is "error".
        num_chunk_tokens: tokens the prefill programs were run over, padding included.
        load_s: time during which pages were copied for it, from disk or to the device.
        exposed_stall_s: the part of it that its computing waited for.
        decision, decision_reason: what became of stored pages, and why.
        num_truncations: how often something was dropped for it.
        num_recomputed_midway: tokens computed again in the middle of the reply, by
            policies that do so when the window is full.
        is_exact: False where pages that were kept across a truncation were lost and not
            rebuilt, in this turn or before: the reply is not what it would have been.
    """

    request: Request
    session: str
    times: Times
    turn_index: int = 0
    prompt: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    reply: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stored: Future[None] | None = None
    error: Exception | None = None
    tokens_from: TokensFrom = field(default_factory=TokensFrom)
    num_chunk_tokens: int = 0
    load_s: float = 0.0
    exposed_stall_s: float = 0.0
    bytes_disk_to_host: int = 0
    bytes_host_to_device: int = 0
    bytes_device_to_host: int = 0
    decision: str = "nothing_stored"
    decision_reason: str = ""
    num_truncations: int = 0
    num_recomputed_midway: int = 0
    is_exact: bool = True
    is_cancel_requested: bool = False

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    def cancel(self) -> None:
        """Asks the engine to end the turn; tokens already received stay."""
        self.is_cancel_requested = True

    @property
    def ttft_s(self) -> float | None:
        """Time to first token from the submission, queueing included."""
        return _between(self.times.submitted_s, self.times.first_token_s)

    @property
    def queue_s(self) -> float | None:
        return _between(self.times.submitted_s, self.times.started_s)

    @property
    def overlap_ratio(self) -> float | None:
        """Share of the loading that computing, its own or that of others, hid."""
        return 1 - self.exposed_stall_s / self.load_s if self.load_s else None

    @property
    def prefill_s(self) -> float | None:
        """Time to first token without queueing: loading and computing."""
        return _between(self.times.started_s, self.times.first_token_s)

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first; None for replies of one token."""
        span = _between(self.times.first_token_s, self.times.finished_s)
        num_later = len(self.reply) - 1
        return span / num_later if span is not None and num_later > 0 else None

    def row(self) -> dict[str, object]:
        """The turn as a row of turns.jsonl."""
        sources = self.tokens_from
        return {
            "session": self.request.session_id,
            "turn": self.turn_index,
            "prompt_tokens": sources.context,
            "tokens_from": dataclasses.asdict(sources),
            "prefill_tokens_computed": sources.recomputed + sources.new,
            "prefill_tokens_padded": self.num_chunk_tokens,
            "output_tokens": len(self.reply),
            "finish_reason": self.finish_reason,
            "truncations": self.num_truncations,
            "recomputed_midway": self.num_recomputed_midway,
            "is_exact": self.is_exact,
            "ttft_s": self.ttft_s,
            "queue_s": self.queue_s,
            "load_s": self.load_s,
            "exposed_stall_s": self.exposed_stall_s,
            "overlap_ratio": self.overlap_ratio,
            "bytes_disk_to_host": self.bytes_disk_to_host,
            "bytes_host_to_device": self.bytes_host_to_device,
            "bytes_device_to_host": self.bytes_device_to_host,
            "prefill_s": self.prefill_s,
            "tpot_s": self.tpot_s,
            "decision": self.decision,
            "decision_reason": self.decision_reason,
        }


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start
