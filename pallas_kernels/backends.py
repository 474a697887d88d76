"""Which implementation of an operation runs, and the sizes it works in.

Knows names of backends, platforms and what arguments must look like. Does not know how
any backend computes.
"""

from dataclasses import dataclass, fields
from typing import no_type_check

import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int, Shaped

from pallas_kernels.rope import RopeTables

# xla runs everywhere and is the reference; cudnn is prefill only; mosaic_tpu is Pallas
# for TPU; triton and mosaic_gpu are Pallas for CUDA, the latter for Hopper.
BACKENDS = ("xla", "mosaic_tpu", "triton", "mosaic_gpu", "cudnn")
# What "auto" means by platform.
AUTO = {"gpu": "triton", "tpu": "mosaic_tpu"}


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """How a kernel cuts up its work: changes speed, and rounding, only.

    None leaves a size to the kernel, which chooses it by the shapes.

    Attributes:
        query_rows: rows of queries (new tokens x query heads of one kv head) that one
            program holds.
        context_tokens: tokens of context per step of its loop.
        splits: parts of a context that are worked on side by side and then merged.
        turns_keys: whether a pass of its own turns keys to absolute positions.
        num_warps, num_stages: warps a program and depth of its software pipeline; CUDA.
    """

    query_rows: int | None = None
    context_tokens: int | None = None
    splits: int | None = None
    turns_keys: bool | None = None
    num_warps: int | None = None
    num_stages: int | None = None

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "turns_keys" and value is not None and value < 1:
                raise ValueError(f"Blocks: {field.name}={value} must be at least 1")


DEFAULT_BLOCKS = Blocks()


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Which implementations a program is built of.

    Attributes:
        prefill, decode: one of `BACKENDS`, or "auto" for the one of the platform.
        interpret: run Pallas kernels in their interpreter, on any platform; slow.
    """

    prefill: str = "auto"
    decode: str = "auto"
    interpret: bool = False

    def __post_init__(self):
        for name in ("prefill", "decode"):
            _check_name(f"{name} kernel", getattr(self, name))


@no_type_check  # what it is handed may be wrong
def check_arguments(
    query: Shaped[Array, "batch *rows heads head_dim"],
    pool: Shaped[Array, "slots layers kv_heads 2 page_tokens head_dim"],
    page_tables: Int[Array, "batch pages_per_sequence"],
    lengths: Int[Array, " batch"],
    rope: RopeTables,
    layer: int,
    window: int | None,
    soft_cap: float | None,
) -> None:
    """Raises ValueError for arguments that do not fit together.

    Values of `page_tables` and `lengths` are checked where they are known, which under
    jit they are not.
    """
    ranks = ("pool", pool, 6), ("page_tables", page_tables, 2), ("lengths", lengths, 1)
    for name, array, rank in ranks:
        if array.ndim != rank:
            raise ValueError(f"{name} has shape {array.shape}, not {rank} axes")
    if pool.shape[3] != 2:
        raise ValueError(f"pool has shape {pool.shape}; axis 3 must be 2, K and V")
    slots, layers, kv_heads, _, page_tokens, head_dim = pool.shape
    heads = query.shape[-2]
    if query.shape[-1] != head_dim:
        raise ValueError(
            f"query has head_dim {query.shape[-1]}, the pool has {head_dim}"
        )
    if heads % kv_heads:
        raise ValueError(f"query has {heads} heads, no multiple of {kv_heads} kv heads")
    if page_tokens != rope.page_tokens:
        raise ValueError(
            f"rope is for pages of {rope.page_tokens} tokens, the pool has pages of "
            f"{page_tokens}"
        )
    if 2 * rope.page_cos.shape[1] != head_dim:
        raise ValueError(
            f"rope is for head_dim {2 * rope.page_cos.shape[1]}, the pool has "
            f"{head_dim}"
        )
    if not 0 <= layer < layers:
        raise ValueError(f"{layer=} is not in 0..{layers - 1}, the layers of the pool")
    if not query.shape[0] == page_tables.shape[0] == lengths.shape[0]:
        raise ValueError(
            f"query, page_tables and lengths are for batches of {query.shape[0]}, "
            f"{page_tables.shape[0]} and {lengths.shape[0]}"
        )
    if page_tables.shape[1] > rope.page_cos.shape[0]:
        raise ValueError(
            f"page_tables has {page_tables.shape[1]} pages a sequence, rope reaches "
            f"{rope.page_cos.shape[0]}"
        )
    if window is not None and window < 1:
        raise ValueError(f"{window=} must be at least 1 token")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"{soft_cap=} must be above 0")
    reach = page_tables.shape[1] * page_tokens
    if _is_known(lengths) and lengths.size and np.max(lengths) > reach:
        raise ValueError(
            f"lengths holds {np.max(lengths)}, page_tables reaches {reach} tokens"
        )
    if _is_known(page_tables) and _is_known(lengths):
        needed = np.arange(page_tables.shape[1]) * page_tokens
        used = np.asarray(page_tables)[needed < np.asarray(lengths)[:, None]]
        outside = used[(used < 0) | (used >= slots)]
        if outside.size:
            raise ValueError(
                f"page_tables holds slot {outside[0]}, the pool has slots 0.."
                f"{slots - 1}"
            )


def resolve_backend(backend: str, auto: dict[str, str]) -> str:
    """The backend to run: `backend`, or for "auto" the one of this platform.

    Args:
        auto: what "auto" means by `jax.default_backend()`; anything else is "xla".

    Raises:
        ValueError: no such backend.
    """
    _check_name("backend", backend)
    return auto.get(jax.default_backend(), "xla") if backend == "auto" else backend


def _check_name(what: str, backend: str) -> None:
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(
            f"{what} {backend!r} is not one of auto, {', '.join(BACKENDS)}"
        )


def require(condition: bool, backend: str, what: str) -> None:
    """Raises NotImplementedError for what a kernel cannot do."""
    if not condition:
        raise NotImplementedError(f'backend="{backend}" cannot do {what}; "xla" can')


def _is_known(x: Array) -> bool:
    return not isinstance(x, Tracer)


DEFAULT_KERNELS = Kernels()
