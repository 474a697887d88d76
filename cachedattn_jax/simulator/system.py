"""What is simulated: a model on a machine with memories and rules. Knows no events."""

import math
from dataclasses import dataclass
from typing import Literal, get_args, no_type_check

from cachedattn_jax.engine.cost_constants import Constants
from cachedattn_jax.simulator.hardware import ModelShape
from cachedattn_jax.store.placement.placement_config import PlacementConfig

Overflow = Literal["keep", "invalidate"]
Allocation = Literal["held", "window"]
Reuse = Literal["cached", "recompute"]


@no_type_check  # users write it; checked here in words of ours
@dataclass(frozen=True, kw_only=True)
class System:
    """One replica.

    Attributes:
        constants: speeds of this model on this machine.
        device_bytes: memory for pages, those of finished turns included; None for
            enough of it and none kept for finished turns, as in the paper.
        reuse: "recompute" keeps nothing.
        allocation: what a session takes in the store: the pages that it holds, or one
            object of a whole window however short it is.
        overflow: what a truncation does to the cache: with positions decoupled it is
            kept, otherwise lost (the paper's OF).
        truncation_ratio: share of the window dropped from the front when it is full.
        keeps_copies: whether pages that come back from disk stay there too, until their
            room is needed.
        is_deciding: whether turns are recomputed where loading is slower.
        is_preloading: whether loads begin before their turn has a seat.
        prefill_overhead_s: of every prefill, however short, on top of its tokens.
        num_groups: layer groups of the loading pipeline; None for one a layer.
    """

    model: ModelShape
    constants: Constants
    host_bytes: int
    disk_bytes: int
    device_bytes: int | None = None
    placement: PlacementConfig = PlacementConfig()
    max_batch: int = 24
    page_tokens: int = 64
    reuse: Reuse = "cached"
    allocation: Allocation = "held"
    overflow: Overflow = "keep"
    truncation_ratio: float = 0.5
    keeps_copies: bool = True
    is_deciding: bool = False
    is_preloading: bool = True
    max_staged: int = 2
    max_passes: int = 4
    num_groups: int | None = None
    prefill_overhead_s: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("reuse", Reuse),
            ("allocation", Allocation),
            ("overflow", Overflow),
        ):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not one of"
                    f" {', '.join(get_args(allowed))}"
                )
        if self.host_bytes < 0 or self.disk_bytes < 0:
            raise ValueError(
                f"host_bytes={self.host_bytes} and disk_bytes={self.disk_bytes} must"
                " not be negative"
            )
        for name, least in (("max_batch", 1), ("page_tokens", 1), ("max_staged", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be at least {least}"
                )
        if self.constants.decode_step_s <= 0:
            raise ValueError(
                f"decode_step_s={self.constants.decode_step_s} of the constants must be"
                " above 0, or no reply would take time"
            )
        if self.disk_bytes and None in (
            self.constants.disk_read,
            self.constants.disk_write,
        ):
            raise ValueError(
                f"disk_bytes={self.disk_bytes} needs constants with disk_read and"
                " disk_write"
            )
        if not 0 < self.truncation_ratio < 1:
            raise ValueError(
                f"truncation_ratio={self.truncation_ratio} must lie between 0 and 1"
            )
        if self.device_bytes is not None and self.num_slots < self.window_pages:
            raise ValueError(
                f"device_bytes={self.device_bytes} holds {self.num_slots} pages, one"
                f" window takes {self.window_pages}"
            )

    @property
    def tokens_per_page(self) -> int:
        is_window = self.allocation == "window"
        return self.model.window if is_window else self.page_tokens

    @property
    def page_bytes(self) -> int:
        return self.tokens_per_page * self.model.kv_bytes

    @property
    def window_pages(self) -> int:
        return -(-self.model.window // self.tokens_per_page)

    @property
    def num_slots(self) -> int | float:
        if self.device_bytes is None:
            return math.inf
        return self.device_bytes // self.page_bytes

    @property
    def groups(self) -> int:
        return self.num_groups or self.model.num_layers

    @property
    def keeps_on_device(self) -> bool:
        """Whether finished turns stay on the device while there is room."""
        return self.device_bytes is not None
