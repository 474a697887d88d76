"""What the terminal shows of presets, constants, decisions and turns.

Knows how numbers are laid out. Does not know how they came about.
"""

from collections.abc import Sequence

from rich.table import Table

from cachedattn_jax.engine.cost_model import Constants, CostModel
from cachedattn_jax.gantt import TrackUse
from cachedattn_jax.model.config import PRESETS
from cachedattn_jax.store.layout import Layout

_LINKS = ("host_to_device", "device_to_host", "disk_read", "disk_write")


def presets_table() -> Table:
    """Every named model configuration."""
    table = Table(title="Model presets", title_justify="left")
    for name in ("preset", "parameters", "layers", "kv heads", "window", "KV/token"):
        table.add_column(name, justify="left" if name == "preset" else "right")
    for name, model in PRESETS.items():
        item_bytes = 4 if model.dtype == "float32" else 2
        per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim
        table.add_row(
            name,
            f"{model.num_parameters / 1e6:,.1f} M",
            str(model.num_layers),
            str(model.num_kv_heads),
            f"{model.window:,}",
            f"{per_token * item_bytes / 2**10:,.0f} KiB",
        )
    return table


def constants_table(constants: Constants) -> Table:
    """Links, prefill speeds and the decode step."""
    table = Table(title="Measured", title_justify="left")
    table.add_column("what")
    for name in ("latency", "speed"):
        table.add_column(name, justify="right")
    for name in _LINKS:
        link = getattr(constants, name)
        if link is not None:
            speed = f"{link.bytes_per_s / 1e9:.2f} GB/s"
            table.add_row(
                name.replace("_", " "), f"{1e6 * link.latency_s:.0f} us", speed
            )
    for size in sorted({min(constants.prefill), max(constants.prefill)}):
        cost = constants.prefill[size]
        seconds = cost.base_s + cost.s_per_context_token * size
        table.add_row(
            f"prefill of {size} tokens",
            f"{1e3 * seconds:.2f} ms",
            f"{size / seconds:,.0f} tokens/s",
        )
    step_s = constants.decode_step_s
    table.add_row("decode step, full batch", f"{1e3 * step_s:.2f} ms", "")
    return table


def decisions_table(model: CostModel, layout: Layout, window: int, new: int) -> Table:
    """Load against recompute for growing histories."""
    table = Table(
        title=f"A turn of {new} new tokens, prefill in ms", title_justify="left"
    )
    table.add_column("history", justify="right")
    for name in ("from host", "from disk", "recomputed"):
        table.add_column(name, justify="right")
    table.add_column("decision, host")
    table.add_column("decision, disk")
    history = layout.page_tokens
    while history + new < window:
        pages = history // layout.page_tokens
        found = {
            tier: model.decide([tier] * pages, history + new)
            for tier in ("host", "disk")
        }
        host, disk = found["host"], found["disk"]
        times = (host.load_s, disk.load_s, host.recompute_s)
        table.add_row(
            f"{history:,}",
            *["" if seconds is None else f"{1e3 * seconds:.1f}" for seconds in times],
            host.choice,
            disk.choice,
        )
        history *= 2
    return table


def tracks_table(turn: str, rows: Sequence[TrackUse]) -> Table:
    """What one turn did on each track."""
    table = Table(title=turn, title_justify="left")
    for name in ("track", "events", "busy ms", "MiB", "GB/s"):
        table.add_column(name, justify="left" if name == "track" else "right")
    for row in rows:
        speed = row.num_bytes / row.busy_s / 1e9 if row.busy_s else 0.0
        table.add_row(
            row.track,
            str(row.num_events),
            f"{1e3 * row.busy_s:.2f}",
            f"{row.num_bytes / 2**20:.1f}" if row.num_bytes else "",
            f"{speed:.2f}" if row.num_bytes else "",
        )
    return table
