"""Load or recompute: how much of what is stored of a prompt a prefill should use.

Pure: knows seconds, bytes and where pages lie; moves nothing. The paper always loads,
which FlashGen (ASPLOS 2025) found slower than recomputing where the disk is slow.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from cachedattn_jax.engine.chunks import CALL_TOKENS
from cachedattn_jax.engine.cost_constants import ChunkCost, Constants, Link
from cachedattn_jax.engine.decision import Decision, best_decision
from cachedattn_jax.engine.pipeline import equal_groups_finish_s, read_buffer_groups
from cachedattn_jax.engine.prefill_cost import PrefillCost

_TIERS = {"device": 0, "host": 1, "disk": 2}
# Weight of a new observation.
_WEIGHT = 0.2
# An observation counts as at most this many times more, or less, than the estimate, so
# that one moves it by 1.4 at most: turns are delayed now and then by what is not ours.
_OUTLIER = 5.0
# How far an estimate of a link goes back to what was measured, for every turn that
# loads nothing. A link that only seemed slow is tried again after tens of turns; one
# that became slow is tried by one turn in five, with a page or two.
_DOUBT = 1 / 64
# Below this, a copy measures the latency and not the bandwidth.
_LEAST_BYTES = 64 * 1024


class CostModel:
    """Predicts loads and prefills, and learns from those that happen.

    Args:
        constants: None where nothing was measured; then everything stored is used.
        page_tokens: tokens of a full page.
        page_bytes: bytes of a page, all layer groups.
        num_groups: layer groups, which are copied one by one.
        chunk_sizes: sizes of the compiled prefill programs, in tokens.
        call_tokens: see `plan_chunks`.

    Raises:
        ValueError: a number is below 1, or a program size was not measured.
    """

    def __init__(
        self,
        constants: Constants | None,
        *,
        page_tokens: int,
        page_bytes: int,
        num_groups: int,
        chunk_sizes: tuple[int, ...],
        call_tokens: int = CALL_TOKENS,
    ) -> None:
        if min(page_tokens, page_bytes, num_groups, *chunk_sizes) < 1:
            raise ValueError("pages, groups and programs must have at least 1 of each")
        self._page_tokens = page_tokens
        self._page_bytes = page_bytes
        self._num_groups = num_groups
        self._chunk_sizes = chunk_sizes
        self._call_tokens = call_tokens
        self._constants: Constants | None = None
        self._prefill_factor = 1.0
        self._link_factors = {"host_to_device": 1.0, "disk_read": 1.0}
        self._prefill_cost: PrefillCost | None = None
        if constants is not None:
            self.calibrate(constants)

    def calibrate(self, constants: Constants) -> None:
        """Starts anew from measured constants."""
        self._prefill_cost = PrefillCost(
            constants.prefill, self._chunk_sizes, self._call_tokens
        )
        self._prefill_factor, self._constants = 1.0, constants
        self._link_factors = dict.fromkeys(self._link_factors, 1.0)

    @property
    def constants(self) -> Constants | None:
        """The constants as refined so far."""
        if self._constants is None:
            return None
        factor = self._prefill_factor
        prefill = {
            size: ChunkCost(factor * cost.base_s, factor * cost.s_per_context_token)
            for size, cost in self._constants.prefill.items()
        }
        links = {name: self._link(name) for name in self._link_factors}
        return replace(self._constants, prefill=prefill, **links)

    def prefill_s(self, num_tokens: int, start: int) -> float:
        """Compute seconds of tokens from position `start`; ValueError if unmeasured."""
        return float(self._prefill(num_tokens, start))

    def load_s(self, num_host_pages: int, num_disk_pages: int) -> float:
        """Seconds on the links until all these pages are on the device.

        Pages from the disk pass both links. The links work at the same time, a layer
        group and a latency at a time: the slower counts, plus one group on the faster,
        since a group cannot be on both.

        Raises:
            ValueError: nothing was measured, or not the disk.
        """
        loads = self._load(np.asarray([num_host_pages]), np.asarray([num_disk_pages]))
        return float(loads[0])

    def read_ahead(
        self, num_host_pages: int, num_disk_pages: int, num_tokens: int, start: int
    ) -> int | None:
        """Layer groups that the read buffer of a turn should hold (section 3.2.1).

        Args:
            num_tokens, start: what is computed, and from which position on.

        Returns:
            None where nothing was measured.
        """
        constants = self._constants
        if constants is None or (num_disk_pages and constants.disk_read is None):
            return None
        return read_buffer_groups(
            self.load_s(num_host_pages, num_disk_pages) / self._num_groups,
            self.prefill_s(num_tokens, start) / self._num_groups,
            self._num_groups,
        )

    def decide(
        self,
        sources: Sequence[str],
        prompt_tokens: int,
        tail_tokens: int = 0,
        lead_s: float = 0.0,
        read_ahead: int = 1,
        copied: Sequence[int] | None = None,
    ) -> Decision:
        """Picks the number of pages with which the prefill ends soonest.

        The loading of a layer group overlaps the computing of those before it, all
        chunks of it, as in the engine. Finishes within 2 % count as equal, and then
        more pages are used.

        Args:
            sources: "device", "host" or "disk", where the pages of the prompt's
                beginning lie, in order.
            prompt_tokens: tokens of the whole prompt.
            tail_tokens: tokens in the last page; 0 for a full one.
            lead_s: seconds that loads may start before the prefill.
            read_ahead: groups in flight or in the read buffer, see `pipeline`.
            copied: pages that travel for each page of the beginning and not for one
                before it: a run in host memory travels whole with its first page. One
                for each that is not on the device, if not given.

        Raises:
            ValueError: a source is unknown, or the stored pages leave no token to
                compute, without which there would be no logits.
        """
        # 512 pages and 40 groups took 0.08 ms (median of 1000) on one core of an AMD
        # EPYC: every number of pages is priced, none is sampled.
        num_pages = len(sources)
        cached = np.arange(num_pages + 1) * self._page_tokens
        if num_pages and tail_tokens:
            cached[-1] += tail_tokens - self._page_tokens
        if not 0 <= tail_tokens <= self._page_tokens or cached[-1] >= prompt_tokens:
            raise ValueError(
                f"{num_pages} pages of {self._page_tokens} tokens, {tail_tokens=}, hold"
                f" more than all but the last of the {prompt_tokens} tokens to prefill"
            )
        if read_ahead < 0 or not lead_s >= 0:
            raise ValueError(f"{read_ahead=} and {lead_s=} must not be negative")
        if unknown := set(sources) - _TIERS.keys():
            raise ValueError(f"no page lies in {sorted(unknown)}")
        tiers = np.asarray([_TIERS[source] for source in sources], np.int64)
        travels = np.asarray(tiers > 0 if copied is None else copied, np.int64)
        host, disk = (_sums(np.where(tiers == tier, travels, 0)) for tier in (1, 2))
        loaded = _sums(tiers > 0)
        if self._constants is None or (disk[-1] and self._constants.disk_read is None):
            finish = None
        else:
            finish = equal_groups_finish_s(
                self._load(host, disk) / self._num_groups,
                self._prefill(prompt_tokens - cached, cached) / self._num_groups,
                num_groups=self._num_groups,
                read_ahead=read_ahead,
                lead_s=lead_s,
            )
        return best_decision(num_pages, loaded, finish)

    def observe_prefill(self, num_tokens: int, start: int, seconds: float) -> None:
        """Refines the compute by a prefill that happened, its stalls taken off."""
        if self._constants is None or num_tokens < 1 or not 0 < seconds < math.inf:
            return
        predicted = self.prefill_s(num_tokens, start)
        if predicted > 0:
            self._prefill_factor *= _step(seconds / predicted)

    def observe_load(
        self,
        tier: Literal["host", "disk"],
        num_bytes: int,
        seconds: float,
        num_copies: int = 1,
    ) -> None:
        """Refines the bandwidth by what a turn loaded from a tier to the next faster
        one.

        Args:
            seconds: during which copies were under way; they may overlap each other.
        """
        garbage = num_bytes < _LEAST_BYTES or not 0 < seconds < math.inf
        name = "host_to_device" if tier == "host" else "disk_read"
        link = self._link(name)
        if link is None or garbage:
            return
        # Copies faster than their latencies alone have a cost per byte below 0: an
        # outlier.
        latencies_s = num_copies * link.latency_s
        observed = (seconds - latencies_s) * link.bytes_per_s / num_bytes
        self._link_factors[name] *= _step(observed)

    def observe_no_load(self) -> None:
        """A turn did without what was stored: what is known of the links gets old."""
        for name, factor in self._link_factors.items():
            self._link_factors[name] = factor ** (1 - _DOUBT)

    def _link(self, name: str) -> Link | None:
        """A link as refined so far; None where it was not measured."""
        link: Link | None = getattr(self._constants, name, None)
        if link is None:
            return None
        return replace(link, bytes_per_s=link.bytes_per_s / self._link_factors[name])

    def _load(self, host_pages: np.ndarray, disk_pages: np.ndarray) -> np.ndarray:
        """`load_s` by case."""
        link, disk = self._link("host_to_device"), self._link("disk_read")
        if link is None:
            raise ValueError("nothing was measured")
        to_device = self._link_s(link, host_pages + disk_pages)
        if not disk_pages.any():
            return to_device
        if disk is None:
            raise ValueError("the disk was not measured")
        from_disk = self._link_s(disk, disk_pages)
        faster = np.minimum(to_device, from_disk)
        return np.maximum(to_device, from_disk) + faster / self._num_groups

    def _link_s(self, link: Link, pages: np.ndarray) -> np.ndarray:
        seconds = pages * (self._page_bytes / link.bytes_per_s)
        return np.where(pages > 0, self._num_groups * link.latency_s + seconds, 0.0)

    def _prefill(
        self, num_tokens: np.ndarray | int, starts: np.ndarray | int
    ) -> np.ndarray | float:
        """`prefill_s` by case."""
        if self._prefill_cost is None:
            raise ValueError("nothing was measured")
        return self._prefill_factor * self._prefill_cost.seconds(num_tokens, starts)


def _sums(counts: np.ndarray) -> np.ndarray:
    """Of the first 0, 1, ... of them."""
    sums = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=sums[1:])
    return sums


def _step(ratio: float) -> float:
    """By how much an observation moves an estimate, given their ratio: as far down as
    up.
    """
    return min(max(ratio, 1 / _OUTLIER), _OUTLIER) ** _WEIGHT
