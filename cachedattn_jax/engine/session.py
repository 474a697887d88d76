"""A conversation as its user holds it. Knows tokens; the engine does the work."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import numpy as np

from cachedattn_jax.engine.request import Request, SamplingParams
from cachedattn_jax.engine.turn import Turn

if TYPE_CHECKING:
    from cachedattn_jax.engine.engine import Engine


class Session:
    """One conversation; make it with `Engine.session(id)`."""

    def __init__(self, engine: Engine, session_id: str, tenant: str) -> None:
        self._engine = engine
        self.session_id = session_id
        self.tenant = tenant

    @property
    def token_ids(self) -> list[int]:
        """Everything said so far, prompts and replies."""
        record = self._engine.store.catalog.find(self.tenant, self.session_id)
        return [] if record is None else record.token_ids.tolist()

    def submit(
        self,
        token_ids: Sequence[int] | np.ndarray,
        *,
        max_tokens: int = 128,
        stop_token_ids: Sequence[int] = (),
        sampling: SamplingParams | None = None,
        is_whole_prompt: bool = False,
    ) -> Turn:
        """Queues a turn and returns at once; see `Request` for the arguments.

        Raises:
            ValueError: the turn cannot be served; the session is as before.
        """
        request = Request(
            session_id=self.session_id,
            tenant=self.tenant,
            token_ids=token_ids,
            max_tokens=max_tokens,
            stop_token_ids=tuple(stop_token_ids),
            sampling=sampling or SamplingParams(),
            is_whole_prompt=is_whole_prompt,
        )
        return self._engine.submit(request)

    def send(
        self,
        token_ids: Sequence[int] | np.ndarray,
        *,
        max_tokens: int = 128,
        stop_token_ids: Sequence[int] = (),
        sampling: SamplingParams | None = None,
    ) -> Generator[int, None, None]:
        """Takes a turn and yields the reply token by token.

        The turn is queued at once, so mistakes raise here. Other turns of the engine go
        on meanwhile. Leaving the loop early cancels the turn; the session keeps the
        tokens that were sampled by then.
        """
        turn = self.submit(
            token_ids,
            max_tokens=max_tokens,
            stop_token_ids=stop_token_ids,
            sampling=sampling,
        )
        return self._replies(turn)

    def _replies(self, turn: Turn) -> Generator[int, None, None]:
        num_yielded = 0
        try:
            while not turn.is_finished or num_yielded < len(turn.reply):
                if num_yielded == len(turn.reply):
                    self._engine.step()
                    continue
                num_yielded += 1
                yield turn.reply[num_yielded - 1]
            if turn.error is not None:
                raise turn.error
        finally:
            if not turn.is_finished:
                turn.cancel()
                self._engine.step()

    def rewind(self, num_tokens: int) -> None:
        """Goes back to the first `num_tokens` tokens, to edit or to ask again.

        Their pages are still reused; the conversation branches from there.

        Raises:
            ValueError: the session has fewer tokens, or a turn of it waits or runs.
        """
        self._engine.rewind(self.tenant, self.session_id, num_tokens)

    def discard(self, token_indices: Sequence[int]) -> None:
        """Takes single tokens out of what the model sees, as KV compression does.

        Nothing moves now. With the next turn the pages behind them are packed anew.

        Args:
            token_indices: places in `token_ids`.

        Raises:
            ValueError: one of them has left already, has no keys and values yet, or
                does not exist; or a turn of the session waits or runs.
        """
        self._engine.discard(self.tenant, self.session_id, token_indices)

    def close(self) -> None:
        """Says that the conversation is over: its pages are the first to go.

        Nothing is deleted. A turn that comes all the same opens it again.
        """
        self._engine.close_session(self.tenant, self.session_id)

    def pin(self, is_pinned: bool = True) -> Future[None]:
        """Keeps the conversation's pages where they are, or lets them go again.

        It lasts: the future ends when that is stored.
        """
        return self._engine.pin(self.tenant, self.session_id, is_pinned)

    def forget(self) -> None:
        """Deletes the conversation and its pages.

        Raises:
            ValueError: a turn of it waits or runs.
        """
        self._engine.forget(self.tenant, self.session_id)
