"""Compute seconds of many prefills at once, from what its programs cost. Pure."""

from collections.abc import Mapping

import numpy as np

from cachedattn_jax.engine.chunks import CALL_TOKENS, plan_chunks
from cachedattn_jax.engine.cost_constants import ChunkCost


class PrefillCost:
    """Sums the programs that `plan_chunks` cuts a prefill into.

    Args:
        costs: by program size, in tokens.
        sizes: of the compiled programs.
        call_tokens: see `plan_chunks`.

    Raises:
        ValueError: a program was not measured.
    """

    def __init__(
        self,
        costs: Mapping[int, ChunkCost],
        sizes: tuple[int, ...],
        call_tokens: int = CALL_TOKENS,
    ) -> None:
        if missing := sorted(set(sizes) - set(costs)):
            raise ValueError(f"prefill programs of {missing} tokens were not measured")
        self._size = max(sizes)
        self._largest = costs[self._size]
        # By number of tokens below twice the largest size: seconds from position 0,
        # and seconds more per token before the first. plan_chunks is too slow to be
        # asked for every number of pages of a decision.
        self._at_0 = np.zeros(2 * self._size)
        self._slopes = np.zeros(2 * self._size)
        for num_tokens in range(2 * self._size):
            end = 0
            for tokens, size in plan_chunks(num_tokens, sizes, call_tokens):
                end += tokens
                slope = costs[size].s_per_context_token
                self._at_0[num_tokens] += costs[size].base_s + slope * end
                self._slopes[num_tokens] += slope

    def seconds(
        self, num_tokens: np.ndarray | int, starts: np.ndarray | int
    ) -> np.ndarray | float:
        """Seconds of all chunks, by case; one case in plain numbers is 10 times faster.

        Args:
            num_tokens: int, tokens to compute.
            starts: int, position of the first of them.
        """
        size, largest = self._size, self._largest
        # plan_chunks cuts whole pieces of the largest size off first; their contexts
        # are an arithmetic series.
        whole = (num_tokens > size) * ((num_tokens - size) // size)
        contexts = whole * starts + size * (whole * (whole + 1) // 2)
        total = whole * largest.base_s + contexts * largest.s_per_context_token
        rest = num_tokens - whole * size
        at = starts + whole * size
        return total + self._at_0[rest] + self._slopes[rest] * at
