"""How the engine cuts, batches and overlaps its work.

Knows choices and their limits. Imports no jax beyond what names a kernel.
"""

from dataclasses import dataclass, replace
from typing import Literal, no_type_check

from cachedattn_jax.engine.chunks import CALL_TOKENS
from cachedattn_jax.engine.truncation import TruncationConfig
from pallas_kernels.backends import Kernels

_LEAST = {
    "page_tokens": 1,
    "layers_per_group": 1,
    "max_batch": 1,
    "read_buffer": 0,
    "max_staged": 0,
    "max_passes": 0,
}
_CAN_BE_AUTO = ("page_tokens", "layers_per_group", "read_buffer")
_CHOICES = {
    "reuse": ("cached", "recompute"),
    "loading": ("auto", "always", "never"),
    "put_order": ("auto", "put_first", "compute_first"),
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of an engine, as numbers; see `EngineConfig`.

    Attributes:
        call_tokens: what one more call of a prefill program costs; see `plan_chunks`.
    """

    page_tokens: int
    layers_per_group: int
    chunk_tokens: tuple[int, ...]
    call_tokens: int = CALL_TOKENS


# What "auto" means. Llama-3-8B, 128 new tokens on 6K in host memory: on one H200 39 ms
# with 1 layer a group, 16.5 with 4, 16.0 with 8; on one H100, whose host was slower,
# 22.0 with 4 and 14.9 with 8, and 27.7 and 22.6 without another turn before it. Pages
# of 64 tokens are the least that all Hopper kernels take; decode then reads 91 % of
# what a copy moves on one H200. A call of a prefill program reads all weights: there
# 6.9 ms for 32 tokens of Llama-3-8B and 8.3 for 128; 15.4 for 512 and 43.7 for 2,048 on
# an H100. 72 % of the later turns of ShareGPT bring at most 32 tokens. TPUs take the
# same and were never timed.
_ON_CPU = Sizes(page_tokens=16, layers_per_group=1, chunk_tokens=(16, 64, 256))
_ON_ACCELERATORS = Sizes(
    page_tokens=64,
    layers_per_group=8,
    chunk_tokens=(32, 128, 512, 2048),
    call_tokens=400,
)


@no_type_check  # gin passes what users write; checked here in words of ours
@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the engine cuts and batches its work.

    Attributes:
        page_tokens: tokens of a page, the unit that is stored and moved; "auto": what
            was measured to suit the platform, see `sizes`.
        layers_per_group: consecutive layers whose pages move together, or "auto".
        max_batch: turns that run at the same time.
        chunk_tokens: sizes of the compiled prefill programs, in tokens, or "auto".
        reuse: "cached" keeps the KV of finished turns; "recompute" is the baseline, the
            same engine without the store.
        loading: what becomes of stored pages that are not on the device. "auto": they
            are loaded as far as that is expected to be faster than computing them,
            once the engine was calibrated; "always"; "never".
        read_buffer: layer groups of the next turn that may be copied to the device
            before its prefill starts (paper, section 3.2.1), or "auto": as many as its
            prefill needs in order not to wait. On CUDA at most 1 for a turn that starts
            alone; see `Staging.look_ahead`.
        is_preloading: whether the copies of a turn overlap its prefill; False loads
            everything, then computes, the baseline of that section.
        put_order: "put_first" starts a copy before the compute it overlaps,
            "compute_first" after it, "auto" what suits the platform.
        max_staged: waiting turns whose pages may be on their way.
        max_passes: turns that may start before one whose pages are on their way.
        truncation: what happens when a conversation reaches the window.
        prefill_kernel, decode_kernel: the attention implementation, one of
            `pallas_kernels.backends.BACKENDS`, or "auto" for the one of the platform.
        interpret_kernels: run Pallas kernels in their interpreter, on any platform;
            slow, for tests.
    """

    page_tokens: int | Literal["auto"] = "auto"
    layers_per_group: int | Literal["auto"] = "auto"
    max_batch: int = 8
    chunk_tokens: tuple[int, ...] | Literal["auto"] = "auto"
    reuse: Literal["cached", "recompute"] = "cached"
    loading: Literal["auto", "always", "never"] = "auto"
    read_buffer: int | Literal["auto"] = "auto"
    is_preloading: bool = True
    put_order: Literal["auto", "put_first", "compute_first"] = "auto"
    max_staged: int = 2
    max_passes: int = 8
    truncation: TruncationConfig = TruncationConfig()
    prefill_kernel: str = "auto"
    decode_kernel: str = "auto"
    interpret_kernels: bool = False

    def __post_init__(self) -> None:
        if self.chunk_tokens != "auto":
            object.__setattr__(self, "chunk_tokens", tuple(self.chunk_tokens))
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if name in _CAN_BE_AUTO and value == "auto":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"{name}={value!r} must be a whole number from {least} on"
                )
        sizes = self.chunk_tokens
        is_whole = sizes and all(isinstance(s, int) and s > 0 for s in sizes)
        if sizes != "auto" and not is_whole:
            raise ValueError(f"chunk_tokens={sizes} must be whole numbers from 1 on")
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                known = ", ".join(map(repr, allowed))
                raise ValueError(f"{name}={value!r} is not one of {known}")
        _ = self.kernels  # raises for a name that is no backend

    def sizes(self, platform: str, num_layers: int) -> Sizes:
        """Numbers for what is "auto"; a group is of as many layers as divide them all.

        Args:
            platform: "cpu", or that of an accelerator.
            num_layers: of the model.
        """
        auto = _ON_CPU if platform == "cpu" else _ON_ACCELERATORS
        groups = range(1, auto.layers_per_group + 1)
        whole = max(size for size in groups if num_layers % size == 0)
        auto = replace(auto, layers_per_group=whole)
        names = ("page_tokens", "layers_per_group", "chunk_tokens")
        given = {name: getattr(self, name) for name in names}
        return replace(auto, **{n: v for n, v in given.items() if v != "auto"})

    @property
    def kernels(self) -> Kernels:
        return Kernels(
            prefill=self.prefill_kernel,
            decode=self.decode_kernel,
            interpret=self.interpret_kernels,
        )
