"""Claim: a whole model runs near the speed of the products and of the memory.

Times prefills and decode steps of a model with random weights and random pages, the
programs that the engine runs, against a product and a copy timed in the same run; and
how long the host takes to dispatch them.

    cachedattn run configs/h200.gin --gin_bindings 'device.run.only = ("model_8b",)'

Expected on an H200: a prefill of 8K tokens at 55 % of the product or more; a decode
step dispatched in less time than the device needs for it.
"""

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from cachedattn_jax.model.config import preset
from cachedattn_jax.run_directory import Claim, RunDirectory
from experiments.deadline import Deadline
from experiments.device_ceilings import copy_rate, product_rate
from experiments.model_programs import ModelPrograms


def run(
    run_directory: RunDirectory,
    *,
    model: str,
    window: int = 8192,
    page_tokens: int = 64,
    layers_per_group: int = 4,
    prefill_cases: Sequence[tuple[int, int]] = ((8192, 0), (128, 8064)),
    decode_cases: Sequence[tuple[int, int]] = ((2, 8000), (16, 8000)),
    claim_tokens: int = 8192,
    copy_bytes: int = 4 << 30,
    product_size: int = 8192,
    repeats: int = 5,
    seed: int = 0,
    seconds: float = math.inf,
) -> dict:
    """Times a model's programs.

    Args:
        prefill_cases: (new tokens, tokens of history), a program each.
        decode_cases: (batch, tokens of context); a batch is a power of two from 2 on.
        claim_tokens: of the prefill without history that a claim is about.
        seconds: that it may take; what would take longer is left out.
    """
    deadline = Deadline(seconds)
    config = preset(model, dtype="bfloat16", window=window)
    ceilings = {
        "copy_bytes_s": copy_rate(copy_bytes),
        "product_flops_s": product_rate(product_size),
    }
    most = max(batch * context for batch, context in decode_cases)
    sizes = tuple(sorted({new for new, _ in prefill_cases}))
    seats = max(batch for batch, _ in decode_cases)
    programs = ModelPrograms(
        config, page_tokens, layers_per_group, most, sizes, seats, seed
    )
    try:
        decodes = [
            programs.time_decode(*case, repeats)
            for case in deadline.over(decode_cases, "decode")
        ]
        prefills = [
            programs.time_prefill(*case, repeats)
            for case in deadline.over(prefill_cases, "prefill")
        ]
    finally:
        programs.close()
    for row in prefills:
        row["share"] = row["flops"] / row["seconds"] / ceilings["product_flops_s"]
    for row in decodes:
        row["share"] = row["bytes"] / row["seconds"] / ceilings["copy_bytes_s"]
    _print(model, prefills, decodes)
    return {
        "model": model,
        "page_tokens": page_tokens,
        "layers_per_group": layers_per_group,
        "ceilings": ceilings,
        "prefill": prefills,
        "decode": decodes,
        "left_out": deadline.left_out,
        "claims": _claims(prefills, decodes, claim_tokens),
    }


def _claims(prefills, decodes, claim_tokens: int) -> list[Claim]:
    shares = [
        row["share"]
        for row in prefills
        if row["new"] == claim_tokens and not row["history"]
    ]
    return [
        Claim(
            name=f"prefill of {claim_tokens} tokens over the product",
            value=shares[0] if shares else None,
            target=0.55,
        ),
        Claim(
            name="decode step over the copy, the best case",
            value=max(row["share"] for row in decodes),
            target=0.7,
        ),
        Claim(
            name="dispatch of a decode step over the step, worst case",
            value=max(row["dispatch_s"] / row["seconds"] for row in decodes),
            target=1.0,
            comparison="<=",
            unit="x",
        ),
    ]


def _print(model: str, prefills: Sequence[dict], decodes: Sequence[dict]) -> None:
    table = Table(title=f"{model}, whole model", title_justify="left")
    for name in ("case", "ms", "alone", "dispatch", "tokens/s", "rate", "share"):
        table.add_column(name, justify="left" if name == "case" else "right")
    for row in prefills:
        table.add_row(
            f"prefill {row['new']} on {row['history']}",
            f"{1e3 * row['seconds']:.2f}",
            "",
            f"{1e3 * row['dispatch_s']:.2f}",
            f"{row['tokens_s']:,.0f}",
            f"{row['flops'] / row['seconds'] / 1e12:.0f} TFLOP/s",
            f"{row['share']:.0%}",
        )
    for row in decodes:
        table.add_row(
            f"decode {row['batch']} x {row['context']}",
            f"{1e3 * row['seconds']:.2f}",
            f"{1e3 * row['alone_s']:.2f}",
            f"{1e3 * row['dispatch_s']:.2f}",
            f"{row['tokens_s']:,.0f}",
            f"{row['bytes'] / row['seconds'] / 1e9:,.0f} GB/s",
            f"{row['share']:.0%}",
        )
    Console().print(table)
