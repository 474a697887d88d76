"""The command `cachedattn`. Knows options and exit codes; imports the rest when needed.

Exit codes: 0 done, also where a claim missed its target; 1 an invariant was broken or
the run failed; 2 the user's mistake, in one sentence.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    name="cachedattn",
    help="Serve multi-turn conversations with a KV cache that outlives the turn.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The entry point."""
    app()


@app.command()
def run(
    configs: Annotated[
        list[str] | None, typer.Argument(help="gin files, later ones win")
    ] = None,
    gin_file: Annotated[
        list[str] | None, typer.Option("--gin_file", help="one more gin file")
    ] = None,
    gin_bindings: Annotated[
        list[str] | None,
        typer.Option("--gin_bindings", help="one binding, 'module.name.parameter = 3'"),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option("--output_dir", help="default: runs/NAME OF THE LAST FILE"),
    ] = None,
    debug: Annotated[
        bool, typer.Option("--debug", help="show where in the code a run failed")
    ] = False,
) -> None:
    """Run an experiment and write its run directory.

    Example:

        cachedattn run configs/quickstart.gin --gin_bindings 'reuse.run.seed = 1'

    The directory then holds summary.json, turns.jsonl, report.html, a timeline for
    Perfetto, and operative.gin, which repeats the run.
    """
    files = [*(configs or []), *(gin_file or [])]
    console = Console()
    try:
        _run(files, gin_bindings or [], output_dir, console)
    except ValueError as error:
        _stop(error, 2, debug)
    except Exception as error:
        _stop(error, 1, debug)


def _run(
    files: list[str], bindings: list[str], output_dir: Path | None, console: Console
) -> None:
    if not files:
        raise ValueError("no gin file is named; try configs/quickstart.gin")
    _keep_compiled_programs()
    import jax

    from cachedattn_jax import config
    from cachedattn_jax.run_directory import RunDirectory, print_claims

    experiment = config.load(files, bindings)
    directory = RunDirectory(output_dir or Path("runs") / Path(files[-1]).stem)
    directory.write_environment(device=jax.devices()[0].device_kind, gin_files=files)
    directory.write_text("config.gin", config.config_text())
    try:
        summary = experiment.run(directory)
    finally:
        directory.write_text("operative.gin", config.operative_text())
    directory.write_summary(summary)
    claims = summary["claims"]
    assert isinstance(claims, list)
    print_claims(claims, console)
    console.print(f"Everything is in {directory.path}/ (open report.html).")


def _stop(error: Exception, code: int, debug: bool) -> None:
    if debug:
        raise error
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    what = "broken invariant" if type(error).__name__ == "InvariantBroken" else "error"
    if code == 1 and what == "error":
        text = f"{type(error).__name__}: {text} (--debug shows where)"
    typer.echo(f"cachedattn: {what}: {text}", err=True)
    raise typer.Exit(code)


def _keep_compiled_programs() -> None:
    """Turns on JAX's persistent compilation cache: a second start is 5 times faster."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    directory = str(cache / "cachedattn_jax" / "xla")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", directory)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


@app.command()
def info() -> None:
    """Show versions, devices, memory and the model presets."""
    import jax

    import cachedattn_jax
    from cachedattn_jax.model.config import PRESETS

    console = Console()
    console.print(
        f"cachedattn_jax {cachedattn_jax.__version__}, jax {jax.__version__},"
    )
    console.print(f"Python {sys.version.split()[0]}")
    for device in jax.devices():
        kinds = ", ".join(memory.kind for memory in device.addressable_memories())
        console.print(f"device {device.id}: {device.device_kind}, memories {kinds}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    console.print(f"host memory: {memory / 2**30:.1f} GiB, {os.cpu_count()} cores")
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
    console.print(table)
