"""What a user calls: an engine that serves turns of conversations with one model.

Knows how the parts are put together. Does not know how a turn goes on: see `loop`.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future

import jax

from cachedattn_jax.engine.calibrate import calibrate
from cachedattn_jax.engine.cost_model import Constants, CostModel
from cachedattn_jax.engine.decode import Decode
from cachedattn_jax.engine.engine_config import EngineConfig, Sizes
from cachedattn_jax.engine.loop import Loop
from cachedattn_jax.engine.overflow import Overflow
from cachedattn_jax.engine.plan import check_window
from cachedattn_jax.engine.prefill import Prefill
from cachedattn_jax.engine.request import Request
from cachedattn_jax.engine.scheduler import Scheduler
from cachedattn_jax.engine.session import Session
from cachedattn_jax.engine.totals import Totals
from cachedattn_jax.engine.turn import Times, Turn
from cachedattn_jax.engine.warm_up import warm_up
from cachedattn_jax.model.config import LlamaConfig
from cachedattn_jax.model.llama import LlamaParams, weights_digest
from cachedattn_jax.store.budget import StoreConfig
from cachedattn_jax.store.catalog import check_id, session_key
from cachedattn_jax.store.layout import Layout
from cachedattn_jax.store.stats import StoreStats
from cachedattn_jax.store.tiered_store import TieredStore
from cachedattn_jax.timeline import Timeline
from pallas_kernels.rope import rope_tables


class Engine:
    """Serves turns of conversations with one model, keeping their KV cache in tiers.

    Args:
        weights: identity of `params`; computed from all their bits if not given.

    Raises:
        ValueError: the budgets cannot hold one full window, or the disk root is
            unusable.
    """

    def __init__(
        self,
        model: LlamaConfig,
        params: LlamaParams,
        config: EngineConfig | None = None,
        store: StoreConfig | None = None,
        *,
        weights: str | None = None,
        device: jax.Device | None = None,
    ) -> None:
        self.model = model
        self.config = config or EngineConfig()
        device = device if device is not None else jax.devices()[0]
        sizes = self._sizes(device)
        self.config.truncation.check(model.window, sizes.page_tokens)
        layout = self._layout(weights or weights_digest(params), sizes)
        store_config = store or StoreConfig()
        if self.config.reuse == "recompute":
            store_config = store_config.device_only
        store_config.check_window(layout, model.window)
        self.timeline = Timeline()
        self.store = TieredStore(layout, store_config, device, self.timeline)
        self.scheduler: Scheduler[Turn] = Scheduler(self.config.max_batch)
        self.cost_model = CostModel(
            None,
            page_tokens=layout.page_tokens,
            page_bytes=layout.page_bytes,
            num_groups=layout.num_groups,
            chunk_sizes=sizes.chunk_tokens,
            call_tokens=sizes.call_tokens,
        )
        pool, num_pages = self.store.pool, layout.num_pages(model.window)
        rope = rope_tables(
            model.inverse_frequencies(),
            page_tokens=layout.page_tokens,
            num_pages=num_pages,
        )
        params, rope = jax.device_put((params, rope), pool.device_sharding)
        order = self.config.put_order
        is_usual = "compute_first" if pool.platform == "tpu" else "put_first"
        self._prefill = Prefill(
            model,
            params,
            rope,
            pool,
            chunk_tokens=sizes.chunk_tokens,
            call_tokens=sizes.call_tokens,
            puts_first=(is_usual if order == "auto" else order) == "put_first",
            watcher=self.store.watchers["compute"],
            kernels=self.config.kernels,
        )
        self._decode = Decode(
            model,
            params,
            rope,
            pool,
            num_seats=self.config.max_batch,
            pages_per_sequence=num_pages,
            kernels=self.config.kernels,
        )
        self._loop = Loop(
            self.config,
            model.window,
            self.store,
            self.scheduler,
            self.cost_model,
            self._prefill,
            self._decode,
            Overflow(
                self.config.truncation,
                model.window,
                self.store,
                model.inverse_frequencies(),
                model.dtype,
            ),
        )

    # ---- what a user calls ----

    def session(self, session_id: str, *, tenant: str = "default") -> Session:
        """A conversation, new or known."""
        check_id("session_id", session_id)
        check_id("tenant", tenant)
        return Session(self, session_id, tenant)

    def submit(self, request: Request) -> Turn:
        """Queues a turn; `step` makes it go on.

        Raises:
            ValueError: the request cannot be served; nothing has changed then.
        """
        check_id("session_id", request.session_id)
        check_id("tenant", request.tenant)
        self._check_prompt(request)
        turn = Turn(
            request=request,
            session=session_key(request.tenant, request.session_id),
            times=Times(submitted_s=time.monotonic()),
        )
        ticket = self.scheduler.submit(turn)
        self.store.placement.queued(
            turn.session, ticket, turn.times.submitted_s, request.tenant
        )
        return turn

    def rewind(self, tenant: str, session_id: str, num_tokens: int) -> None:
        """Makes a session's first `num_tokens` tokens all that was said.

        Raises:
            ValueError: it has fewer tokens, or a turn of it waits or runs.
        """
        self._check_quiet(tenant, session_id)
        self.store.sessions.rewind(tenant, session_id, num_tokens)

    def discard(
        self, tenant: str, session_id: str, token_indices: Sequence[int]
    ) -> None:
        """Takes tokens out of a session's context; see `Session.discard`."""
        self._check_quiet(tenant, session_id)
        self.store.sessions.discard(tenant, session_id, token_indices)

    def forget(self, tenant: str, session_id: str) -> "Future[None]":
        """Deletes a session and its pages; ValueError while it has a turn under way.

        The future ends when a restart would not find it any more.
        """
        self._check_quiet(tenant, session_id)
        return self.store.sessions.forget(tenant, session_id)

    def erase_tenant(self, tenant: str) -> "Future[None]":
        """Erases every session of a tenant, in every tier and from the disk root.

        The future ends when nothing of it is stored any more; it fails with
        StorageFailure when that could not be done, and may be asked for again.

        Raises:
            ValueError: a turn of the tenant waits or runs.
        """
        turns = self.scheduler.running + self.scheduler.waiting
        if tenant in {turn.request.tenant for turn in turns}:
            raise ValueError(f"a turn of tenant {tenant!r} waits or runs")
        return self.store.sessions.erase_tenant(tenant)

    def close_session(self, tenant: str, session_id: str) -> None:
        """Says that a conversation is over: its pages are the first to go.

        Nothing is deleted. A turn that comes all the same opens it again.
        """
        self.store.placement.closed(session_key(tenant, session_id))

    def pin(
        self, tenant: str, session_id: str, is_pinned: bool = True
    ) -> "Future[None]":
        """Keeps a conversation's pages where they are, or lets them go again.

        It lasts: the future ends when that is stored.
        """
        return self.store.sessions.pin(tenant, session_id, is_pinned)

    def run(self, requests: Iterable[Request]) -> list[Turn]:
        """Serves all requests, batched, and returns their turns in the same order."""
        turns = [self.submit(request) for request in requests]
        self.run_until_idle()
        return turns

    def run_until_idle(self) -> None:
        """Steps until no turn waits or runs."""
        while not self.scheduler.is_idle:
            self.step()

    def step(self) -> None:
        """Advances every turn that can advance; see `Loop.step`."""
        self._loop.step()

    def warm_up(self, progress: Callable[[str, int, int], None] | None = None) -> None:
        """Compiles every program before the first turn needs it, then calibrates.

        Args:
            progress: called with what is compiled, how many are done, and of how many.
        """
        pinned = self.store.config.num_pinned_bytes
        warm_up(self._prefill, self._decode, self.store.pool, pinned, progress)
        if self.config.reuse == "cached" and self.config.loading == "auto":
            self.calibrate()

    def calibrate(self) -> Constants:
        """Measures what loading and computing cost here; nothing may be running.

        From then on each turn loads or recomputes, whichever is expected to be faster.
        """
        if not self.scheduler.is_idle:
            raise ValueError("a turn waits or runs; calibrate before or after")
        constants = calibrate(self._prefill, self._decode, self.store)
        self.cost_model.calibrate(constants)
        return constants

    @property
    def totals(self) -> Totals:
        """Sums over all turns that have ended: tokens by source, times."""
        return self._loop.totals

    def stats(self) -> StoreStats:
        """What the store holds, and what has happened in it: misses by reason, moves,
        evictions, failures."""
        return self.store.stats()

    def close(self) -> None:
        """Cancels turns, writes what only memory holds to disk, stops the threads."""
        self._loop.stop()
        self.store.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check_prompt(self, request: Request) -> None:
        request.check_vocabulary(self.model.vocab_size)
        record = self.store.catalog.find(
            request.tenant, request.session_id, is_fresh=True
        )
        check_window(self.config.truncation, self.model.window, request, record)

    def _check_quiet(self, tenant: str, session_id: str) -> None:
        session = session_key(tenant, session_id)
        if session in {
            t.session for t in self.scheduler.running + self.scheduler.waiting
        }:
            raise ValueError(f"a turn of session {session_id!r} waits or runs")

    def _sizes(self, device: jax.Device) -> Sizes:
        return self.config.sizes(device.platform, self.model.num_layers)

    def _layout(self, weights: str, sizes: Sizes) -> Layout:
        model = self.model
        return Layout(
            num_layers=model.num_layers,
            layers_per_group=sizes.layers_per_group,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            page_tokens=sizes.page_tokens,
            dtype=model.dtype,
            rope=f"theta={model.rope_theta} scaling={model.rope_scaling}",
            norm_eps=model.norm_eps,
            weights=weights,
        )
