"""Claim: attention over pages runs at the speed of the memory and of the products.

Checks every kernel that the device can run against float64, then times it at the
shapes of Llama-3-8B and Llama-2-13B, against a copy and a matrix product timed in the
same run.

    cachedattn run configs/kernel_speed.gin        one H200, 4 minutes

Expected on an H200: decode at 80 % of the copy or more at 16 contexts of 8K tokens,
prefill at 55 % of the matrix product or more at 8K tokens.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cachedattn_jax.model.config import preset
from cachedattn_jax.run_directory import Claim, RunDirectory
from experiments.contiguous_attention import decode_contiguous, prefill_contiguous
from experiments.deadline import Deadline
from experiments.device_ceilings import best_s, copy_rate, product_rate
from experiments.kernel_errors import (
    decode_errors,
    prefill_errors,
    random_decode,
    random_prefill,
)
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.prefill_attention import prefill_attention

# The row of each claim: 8K tokens, a batch of 16 for decode.
CLAIM_TOKENS, CLAIM_BATCH = 8192, 16
# Not a kernel of ours: no claim counts it.
CONTIGUOUS = "contiguous"
# To be compared with, by itself or the other: no claim is made of these alone.
_REFERENCES = (CONTIGUOUS, "xla")


def run(
    run_directory: RunDirectory,
    *,
    models: Sequence[str] = ("llama-3-8b", "llama-2-13b"),
    backends: Sequence[str] = ("auto",),
    page_tokens: Sequence[int] = (64,),
    decode_cases: Sequence[tuple[int, int]] = ((16, 8192),),
    prefill_cases: Sequence[tuple[int, int, int]] = ((1, 8192, 0),),
    interpret: bool = False,
    is_checked: bool = True,
    copy_bytes: int = 4 << 30,
    product_size: int = 8192,
    seed: int = 0,
    seconds: float = math.inf,
) -> dict[str, object]:
    """Checks and times attention on the default device.

    Args:
        backends: implementations to compare; those that refuse a case say why. Beside
            those of the kernels "contiguous": cuDNN on a cache without pages, rotated
            before, the bound of a library that has no store.
        decode_cases: (batch, context tokens).
        prefill_cases: (batch, new tokens, tokens of history before them).
        interpret: run Pallas kernels in their interpreter, to try the experiment out.
        is_checked: whether errors are measured, too.
        copy_bytes, product_size: size of the array copied and of the square matrices
            multiplied to find the ceilings.
        seconds: that it may take; what would take longer is left out.
    """
    console, deadline = Console(), Deadline(seconds)
    ceilings = {
        "copy_bytes_s": copy_rate(copy_bytes),
        "product_flops_s": product_rate(product_size),
    }
    rows = []
    cases = [("decode", case) for case in decode_cases]
    cases += [("prefill", case) for case in prefill_cases]
    todo = [
        (preset(model, dtype="bfloat16"), size, backend, kind, case)
        for size in page_tokens
        for backend in backends
        for kind, case in cases
        for model in models
    ]
    ours = [backend for backend in backends if backend != CONTIGUOUS]
    errors = []
    for config in [preset(m, dtype="bfloat16") for m in models if is_checked]:
        errors += decode_errors(config, ours, page_tokens, interpret, seed)
        both = (*ours, CONTIGUOUS)
        errors += prefill_errors(config, both, page_tokens, interpret, seed)
    for config, size, backend, kind, case in deadline.over(
        track(todo, "timing", console=console)
    ):
        row = {
            "heads": f"{config.num_heads}/{config.num_kv_heads}",
            "page_tokens": size,
            "backend": backend,
            "operation": kind,
            "case": list(case),
        }
        timers = {"decode": _time_decode, "prefill": _time_prefill}
        if backend == CONTIGUOUS:
            timers = {"decode": decode_contiguous, "prefill": prefill_contiguous}
        try:
            row |= timers[kind](config, size, backend, interpret, seed, *case)
        except NotImplementedError as error:
            row["refused"] = str(error)
        rows.append(row)
    _print(rows, ceilings, console)
    run_directory.write_json("kernels.json", {"ceilings": ceilings, "rows": rows})
    return {
        "device": jax.devices()[0].device_kind,
        "ceilings": ceilings,
        "errors": errors,
        "rows": rows,
        "left_out": [f"{len(todo) - len(rows)} cases"] if deadline.left_out else [],
        "claims": [
            *_speed_claims(rows, ceilings, todo),
            *(_error_claims(errors) if is_checked else ()),
        ],
    }


def _speed_claims(rows, ceilings, todo) -> Iterator[Claim]:
    """Of the cases that were to be measured; those that were not have no value."""
    cases = {
        (kind, *case) for *_, backend, kind, case in todo if backend not in _REFERENCES
    }
    decode = _best(rows, "decode", [CLAIM_BATCH, CLAIM_TOKENS], "bytes_s")
    prefill = _best(rows, "prefill", [1, CLAIM_TOKENS, 0], "flops_s")
    if ("decode", CLAIM_BATCH, CLAIM_TOKENS) in cases:
        yield Claim(
            name="decode_share_of_copy",
            value=decode and decode / ceilings["copy_bytes_s"],
            target=0.80,
        )
    if ("prefill", 1, CLAIM_TOKENS, 0) in cases:
        yield Claim(
            name="prefill_share_of_product",
            value=prefill and prefill / ceilings["product_flops_s"],
            target=0.55,
        )


def _error_claims(errors) -> list[Claim]:
    worst: dict[str, float] = {}
    for error in [error for error in errors if "ratio" in error]:
        library = "library " if error["backend"] == CONTIGUOUS else ""
        name = library + error["operation"]
        worst[name] = max(worst.get(name, 0.0), error["ratio"])
    ours, library_error = worst.get("prefill"), worst.get("library prefill")
    return [
        *[
            Claim(
                name=f"{operation}_error_over_absolute_positions",
                value=worst.get(operation),
                target=1.1,
                comparison="<=",
            )
            for operation in ("decode", "prefill")
        ],
        Claim(
            name="prefill_error_over_that_of_cudnn_without_pages",
            value=ours / library_error if ours and library_error else None,
            target=1.1,
            comparison="<=",
        ),
    ]


def _best(rows, operation, case, rate) -> float | None:
    """The slowest model's rate under the backend that is best for it."""
    best: dict[str, float] = {}
    for row in rows:
        is_case = row["operation"] == operation and row["case"] == case
        if is_case and rate in row and row["backend"] != CONTIGUOUS:
            best[row["heads"]] = max(best.get(row["heads"], 0.0), row[rate])
    return min(best.values(), default=None)


# ---- speed ----


def _time_decode(config, page_tokens, backend, interpret, seed, batch, context):
    arguments = random_decode(config, page_tokens, batch, context, seed)
    attend = functools.partial(
        decode_attention, layer=0, backend=backend, interpret=interpret
    )
    seconds = _chained(attend, *arguments, calls=64)
    num_bytes = batch * context * 2 * config.num_kv_heads * config.head_dim * 2
    return {"seconds": seconds, "bytes_s": num_bytes / seconds}


def _time_prefill(config, page_tokens, backend, interpret, seed, batch, new, history):
    arguments = random_prefill(config, page_tokens, batch, history, new, seed)
    attend = functools.partial(
        prefill_attention,
        layer=0,
        has_history=history > 0,
        backend=backend,
        interpret=interpret,
    )
    seconds = _chained(attend, *arguments, calls=16)
    pairs = batch * (new * history + new * (new + 1) / 2)
    flops = 4 * config.num_heads * config.head_dim * pairs
    return {"seconds": seconds, "flops_s": flops / seconds}


def _chained(attend: Callable, query, *rest, calls: int) -> float:
    """Seconds of a call whose query is the output of the one before, so that parallel
    calls do not blur it; the one dispatch of all, 0.2 ms, is shared by `calls`.
    """

    @jax.jit
    def chain(query, *rest):
        return jax.lax.fori_loop(0, calls, lambda _, q: attend(q, *rest), query)

    return best_s(chain, query, *rest, calls=1) / calls


def _print(rows, ceilings, console) -> None:
    table = Table(
        "heads", "page", "backend", "operation", "case", "ms", "rate", "share"
    )
    for row in rows:
        cells = [str(row[name]) for name in ("heads", "page_tokens", "backend")]
        cells += [row["operation"], " ".join(map(str, row["case"]))]
        if "refused" in row:
            table.add_row(*cells, "-", row["refused"], "-")
            continue
        if "bytes_s" in row:
            rate, ceiling = row["bytes_s"], ceilings["copy_bytes_s"]
            words = f"{rate / 1e9:,.0f} GB/s"
        else:
            rate, ceiling = row["flops_s"], ceilings["product_flops_s"]
            words = f"{rate / 1e12:,.0f} TFLOP/s"
        milliseconds = f"{1e3 * row['seconds']:,.3f}"
        table.add_row(*cells, milliseconds, words, f"{rate / ceiling:.0%}")
    console.print(table)
