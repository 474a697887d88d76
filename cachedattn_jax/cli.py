"""The command `cachedattn`. Knows options and exit codes; imports the rest when needed.

Exit codes: 0 done, also where a claim missed its target; 1 an invariant was broken or
the run failed; 2 the user's mistake, in one sentence.
"""

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cachedattn_jax.exit_codes import exit_codes
from cachedattn_jax.store_cli import store_app

_HELP = """Serve multi-turn conversations with a KV cache that outlives the turn.

Start with `cachedattn run configs/quickstart.gin`: real conversations served twice,
once from the cache and once recomputing their history, with every token compared.
"""

_RUN_HELP = """Run an experiment and write its run directory.

Examples:

    cachedattn run configs/quickstart.gin

    cachedattn run configs/quickstart.gin --gin_bindings 'reuse.run.seed = 1' \\
        --output_dir runs/seed1

The run directory then holds summary.json with the claims, turns.jsonl with one row per
turn, report.html, timeline.json.gz for Perfetto, and operative.gin, which repeats the
run: `cachedattn run runs/seed1/operative.gin --output_dir runs/again`.
"""

app = typer.Typer(
    name="cachedattn",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.add_typer(store_app, name="store")


def main() -> None:
    """The entry point."""
    app()


@app.callback(help=_HELP)
def _commands() -> None:
    pass


@app.command(help=_RUN_HELP)
def run(
    configs: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE.gin", help="Gin files; later ones win."),
    ] = None,
    gin_file: Annotated[
        list[str] | None,
        typer.Option("--gin_file", help="One more gin file. Repeatable."),
    ] = None,
    gin_bindings: Annotated[
        list[str] | None,
        typer.Option(
            "--gin_bindings",
            help="'module.name.parameter = value', wins over the files. Repeatable.",
        ),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            "--output_dir",
            help="New, empty, or of an earlier run, which is replaced."
            " Default: runs/NAME of the last file.",
        ),
    ] = None,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show where in the code a mistake was found."),
    ] = False,
) -> None:
    files = [*(configs or []), *(gin_file or [])]
    with exit_codes(debug):
        if not files:
            raise ValueError("no gin file is named; try configs/quickstart.gin")
        _run(
            files, gin_bindings or [], output_dir or Path("runs", Path(files[-1]).stem)
        )


def _run(files: list[str], bindings: list[str], output_dir: Path) -> None:
    _keep_compiled_programs()
    _keep_copies_apart()
    from cachedattn_jax import config
    from cachedattn_jax.run_directory import RunDirectory, claims_of, print_claims

    experiment = config.load(files, bindings)
    facts = {"seed": experiment.seed, "gin_files": files, "gin_bindings": bindings}
    directory = RunDirectory(
        output_dir, config=config.config_str(), facts={**facts, **_device_facts()}
    )
    try:
        summary = experiment.start(directory)
        claims = claims_of(summary)
    finally:
        if directory.is_open:
            directory.write_text("operative.gin", config.operative_str())
    directory.write_summary(summary)
    console = Console()
    console.print(f"Everything is in {directory.path}/.", highlight=False)
    print_claims(claims, console)


def _keep_compiled_programs() -> None:
    """Turns on JAX's persistent compilation cache: a second start is 5 times faster."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = str(Path(caches) / "cachedattn_jax" / "xla")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", directory)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def _keep_copies_apart() -> None:
    """Gives each stream of a CUDA device a queue of its own.

    By default there are 8 for them: on an H100 a token of a few bytes then waited 8 ms
    for pages that were to be copied after the next program.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


def _device_facts() -> dict[str, object]:
    import jax

    devices = jax.devices()
    return {"device": devices[0].device_kind, "num_devices": len(devices)}


_TIMELINE_HELP = """Draw one turn of a run: what was copied, computed and waited for.

Examples:

    cachedattn timeline runs/quickstart

    cachedattn timeline runs/quickstart --list

    cachedattn timeline runs/quickstart --turn 'alice#3' --output turn.png

The whole timeline opens in Perfetto (ui.perfetto.dev): RUN/timeline.json.gz.
"""


@app.command(help=_TIMELINE_HELP)
def timeline(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    turn: Annotated[
        str | None,
        typer.Option("--turn", help="SESSION#INDEX. Default: most bytes loaded."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="A .svg or .png. Default: RUN/turn.svg."),
    ] = None,
    list_turns: Annotated[
        bool, typer.Option("--list", help="Only name the turns.")
    ] = False,
) -> None:
    from cachedattn_jax import gantt
    from cachedattn_jax.tables import tracks_table

    with exit_codes(debug=False):
        path = run / "timeline.json.gz" if run.is_dir() else run
        events = gantt.read_timeline(path)
        if list_turns:
            typer.echo("\n".join(gantt.turns(events)))
            return
        turn = turn or gantt.busiest_turn(events)
        gantt.check_turn(events, turn)
        output = output or path.parent / "turn.svg"
        if output.suffix not in (".svg", ".png"):
            raise ValueError(f"{output} must end in .svg or .png")
        gantt.draw_turn(events, turn).savefig(output, dpi=150)
        console = Console(highlight=False)
        console.print(tracks_table(turn, gantt.track_table(events, turn)))
        console.print(f"The picture is in {output}.")


_DOCTOR_HELP = """Measure what copies and programs cost here, and what follows.

The engine loads stored pages or computes them again, whichever these numbers say is
sooner. Examples:

    cachedattn doctor

    cachedattn doctor --model llama-3-8b --page_tokens 64 --chunk_tokens 512,2048
"""


@app.command(help=_DOCTOR_HELP)
def doctor(
    model: Annotated[str, typer.Option("--model", help="A preset.")] = "small",
    disk_root: Annotated[
        str | None,
        typer.Option("--disk_root", help="A folder on the disk to measure."),
    ] = None,
    page_tokens: Annotated[int, typer.Option("--page_tokens")] = 16,
    layers_per_group: Annotated[int, typer.Option("--layers_per_group")] = 1,
    chunk_tokens: Annotated[
        str, typer.Option("--chunk_tokens", help="Sizes of the prefill programs.")
    ] = "16,64,256",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the constants as JSON.")
    ] = False,
) -> None:
    with exit_codes(debug=False):
        _keep_compiled_programs()
        _keep_copies_apart()
        from rich.status import Status

        from cachedattn_jax.doctor import examine
        from cachedattn_jax.tables import constants_table, decisions_table

        sizes = chunk_tokens.split(",")
        if not all(size.strip().isdigit() for size in sizes):
            raise ValueError(
                f"--chunk_tokens={chunk_tokens!r} must look like 16,64,256"
            )
        stderr = Console(stderr=True)
        with Status("compiling and measuring", console=stderr) as status:
            engine, constants = examine(
                model,
                disk_root=disk_root,
                page_tokens=page_tokens,
                layers_per_group=layers_per_group,
                chunk_tokens=tuple(map(int, sizes)),
                progress=lambda name, done, total: status.update(
                    f"{done} of {total}: {name}"
                ),
            )
        if as_json:
            typer.echo(json.dumps(constants.describe(), indent=1))
            return
        console = Console(highlight=False)
        console.print(constants_table(constants))
        console.print(
            decisions_table(
                engine.cost_model, engine.store.layout, engine.model.window, 32
            )
        )


@app.command()
def info() -> None:
    """Show versions, devices, memory and the model presets."""
    import jax

    from cachedattn_jax.run_directory import environment, versions
    from cachedattn_jax.tables import presets_table

    console = Console(highlight=False)
    console.print(
        ", ".join(f"{name} {version}" for name, version in versions().items())
    )
    facts = environment()
    console.print(f"Python {facts['python']} on {facts['platform']}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    console.print(f"host: {facts['num_cpus']} cores, {memory / 2**30:.1f} GiB")
    for device in jax.devices():
        kinds = ", ".join(sorted(m.kind for m in device.addressable_memories()))
        limit = (device.memory_stats() or {}).get("bytes_limit")
        size = f"{limit / 2**30:.1f} GiB, " if limit else ""
        console.print(
            f"device {device.id}: {device.device_kind}, {size}memories {kinds}"
        )
    console.print(presets_table())
