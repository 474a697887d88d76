"""Tiles of context on their way from pages to the shared memory of a Hopper GPU.

Knows page tables, copies and their barriers. Does not know what is computed of a tile.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

# A tensor core instruction of one warpgroup is so many rows high.
WARPGROUP_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of one call; see `Blocks`.

    Attributes:
        warpgroups: of `WARPGROUP_ROWS` rows each; they share the tiles of context.
        tile: tokens of context per step.
        tile_copies: pages, or the one part of a page, that make up a tile.
    """

    warpgroups: int
    tile: int
    tile_copies: int
    turns_keys: bool
    stages: int

    @property
    def row_block(self) -> int:
        return self.warpgroups * WARPGROUP_ROWS

    @property
    def has_loader(self) -> bool:
        """Whether a warpgroup of its own issues the copies."""
        return self.warpgroups > 1

    @property
    def num_threads(self) -> int:
        return self.warpgroups + self.has_loader


def scratch(plan: Plan, head_dim: int) -> dict[str, Any]:
    """Shared memory of a program and the barriers of its copies."""
    # Halves of a head that are multiplied alone are swizzled alone.
    columns = min(head_dim, 64) if plan.turns_keys else head_dim // 2

    def matrix(*shape):
        transforms = (
            plgpu.TilingTransform((8, columns)),
            plgpu.SwizzleTransform(columns * jnp.dtype(jnp.bfloat16).itemsize),
        )
        return plgpu.SMEM((*shape, head_dim), jnp.bfloat16, transforms=transforms)

    def barriers(num_arrivals):
        return plgpu.Barrier(num_arrivals=num_arrivals, num_barriers=plan.stages)

    # The angles of a page arrive with its keys.
    angle_copies = 0 if plan.turns_keys else 2
    common = {
        "keys": matrix(plan.stages, plan.tile),
        "values": matrix(plan.stages, plan.tile),
        "keys_ready": barriers(plan.tile_copies + angle_copies),
        "values_ready": barriers(plan.tile_copies),
        # For warpgroups that share tiles; one alone needs none of them.
        "keys_free": barriers(plan.warpgroups),
        "values_free": barriers(plan.warpgroups),
        "cleared": plgpu.Barrier(num_arrivals=plan.warpgroups),
    }
    if plan.turns_keys:
        return common | {
            "rows": matrix(plan.warpgroups, WARPGROUP_ROWS),
            "rows_ready": plgpu.Barrier(num_barriers=plan.warpgroups),
        }
    angles = plgpu.SMEM((plan.stages, head_dim // 2), jnp.float32)
    return common | {"cos": angles, "sin": angles}


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """The tiles of one program: `count` of them from `first` on.

    Attributes:
        shared: what `scratch` describes, by its names.
        slot_of, keys_of, values_of, angles_of: where things are in global memory.
    """

    plan: Plan
    shared: Any
    first: Array
    count: Array
    page_tokens: int
    slot_of: Callable[[Array], Array]  # by page
    keys_of: Callable[[Array, Array], Any]  # by page and slot: [page_tokens, head_dim]
    values_of: Callable[[Array, Array], Any]
    angles_of: Callable[[Array], tuple[Any, Any]]  # by page: cosines and sines

    def places(self, step) -> list[tuple[Array, Array]]:
        """(page, slot) of each copy that makes up the tile of a step."""
        token = (self.first + step) * self.plan.tile
        page = lax.div(token, self.page_tokens)
        pages = [page + part for part in range(self.plan.tile_copies)]
        return [(page, self.slot_of(page)) for page in pages]

    def load_keys(self, step, places) -> None:
        stage = lax.rem(step, self.plan.stages)
        ready = self.shared.keys_ready.at[stage]
        self._copy(step, places, self.keys_of, self.shared.keys.at[stage], ready)
        if not self.plan.turns_keys:
            targets = self.shared.cos, self.shared.sin
            sources = self.angles_of(places[0][0])
            for source, target in zip(sources, targets, strict=True):
                plgpu.copy_gmem_to_smem(source, target.at[stage], ready)

    def load_values(self, step, places) -> None:
        stage = lax.rem(step, self.plan.stages)
        ready = self.shared.values_ready.at[stage]
        self._copy(step, places, self.values_of, self.shared.values.at[stage], ready)

    def load_first(self) -> None:
        """Fills every stage."""

        def load(step):
            places = self.places(step)
            self.load_keys(step, places)
            self.load_values(step, places)

        for step in range(self.plan.stages):
            pl.when(step < self.count)(lambda step=step: load(jnp.int32(step)))

    def load_rest(self) -> None:
        """Fills stages as they come free, for a warpgroup that does only that."""

        def load(step, _):
            stage = lax.rem(step, self.plan.stages)
            places = self.places(step)
            plgpu.barrier_wait(self.shared.keys_free.at[stage])
            self.load_keys(step, places)
            plgpu.barrier_wait(self.shared.values_free.at[stage])
            self.load_values(step, places)

        lax.fori_loop(self.plan.stages, self.count, load, None)

    def _copy(self, step, places, source_of, target, ready) -> None:
        height = self.plan.tile // self.plan.tile_copies
        inside = slice(None)
        if height < self.page_tokens:
            offset = lax.rem((self.first + step) * height, self.page_tokens)
            inside = pl.ds(pl.multiple_of(offset, height), height)
        for part, place in enumerate(places):
            plgpu.copy_gmem_to_smem(
                source_of(*place).at[inside],
                target.at[pl.ds(part * height, height)],
                ready,
            )
