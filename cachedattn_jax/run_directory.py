"""What a run leaves behind, and the claims it ends with.

Knows files and tables. Does not know experiments, engines or gin.

    config.gin  operative.gin  environment.json  turns.jsonl
    summary.json  timeline.json.gz  report.html
"""

import dataclasses
import gzip
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

_MARK = "environment.json"  # what tells an earlier run from a folder of something else
_FILES = (
    "config.gin",
    "operative.gin",
    _MARK,
    "turns.jsonl",
    "summary.json",
    "timeline.json.gz",
    "report.html",
)
_PACKAGES = ("cachedattn_jax", "jax", "jaxlib", "flax", "tensorstore", "numpy")

Kind = Literal["measured", "emulated", "simulated"]


class InvariantBroken(Exception):
    """A run found a result that no correct program gives."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One number of a run held against its target.

    Attributes:
        comparison: how `value` must relate to `target`.
        kind: whether real work was timed or counted, timed with emulated links, or
            computed by a simulator.
    """

    name: str
    value: int | float | bool | None
    target: int | float | bool
    comparison: Literal[">=", "<=", "=="] = ">="
    unit: str = ""
    kind: Kind = "measured"

    @property
    def holds(self) -> bool:
        if self.value is None or math.isnan(self.value):
            return False
        match self.comparison:
            case ">=":
                return self.value >= self.target
            case "<=":
                return self.value <= self.target
            case "==":
                return self.value == self.target

    def row(self) -> dict[str, object]:
        """The claim as summary.json has it."""
        return {
            "name": self.name,
            "value": self.value,
            "target": self.target,
            "comparison": self.comparison,
            "unit": self.unit,
            "holds": self.holds,
            "kind": self.kind,
        }


class RunDirectory:
    """The folder of one run.

    Raises:
        ValueError: the folder cannot be used, or holds files of something else.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            found = {entry.name for entry in self.path.iterdir()}
        except OSError as error:
            raise ValueError(
                f"output_dir={str(path)!r} cannot be used: {error}"
            ) from error
        if found and _MARK not in found:
            raise ValueError(
                f"output_dir={str(path)!r} holds files that are not of a run"
                f" ({sorted(found)[0]}, ...); name an empty folder or a new one"
            )
        if not os.access(self.path, os.W_OK):
            raise ValueError(f"output_dir={str(path)!r} is not writable")
        for name in _FILES:
            (self.path / name).unlink(missing_ok=True)

    def fresh_folder(self, name: str) -> Path:
        """An empty folder inside; what an earlier run left in it is removed."""
        folder = self.path / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def write_environment(self, **facts: object) -> None:
        """Notes versions, machine and commit, and whatever else is given."""
        environment = {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "num_cpus": os.cpu_count(),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "commit": _commit(),
            "versions": {name: _version(name) for name in _PACKAGES},
            **facts,
        }
        self.write_text(_MARK, json.dumps(environment, indent=1))

    def note_environment(self, **facts: object) -> None:
        """Adds facts, such as the seed, to environment.json."""
        path = self.path / _MARK
        known = json.loads(path.read_text()) if path.exists() else {}
        self.write_text(_MARK, json.dumps(known | facts, indent=1))

    def write_text(self, name: str, text: str) -> None:
        """Writes a file whole: a reader sees the old one or the new one."""
        part = self.path / f".{name}.part"
        part.write_text(text)
        part.replace(self.path / name)

    def append_turns(self, rows: Sequence[Mapping[str, object]]) -> None:
        """Adds rows to turns.jsonl."""
        with (self.path / "turns.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def write_timeline(self, trace: Mapping[str, object]) -> None:
        """Writes a Chrome trace, which Perfetto opens too."""
        with gzip.open(self.path / "timeline.json.gz", "wt") as file:
            json.dump(trace, file)

    def write_summary(self, summary: Mapping[str, object]) -> None:
        """Writes summary.json; claims may be `Claim`s."""
        self.write_text("summary.json", json.dumps(summary, indent=1, default=_plain))


def print_claims(claims: Sequence[Claim], console: Console) -> None:
    """The table a run ends with."""
    table = Table(title="Claims", title_justify="left")
    for name in ("claim", "value", "target", "unit", "kind", "holds"):
        table.add_column(
            name, justify="right" if name in ("value", "target") else "left"
        )
    for claim in claims:
        table.add_row(
            claim.name,
            _number(claim.value),
            f"{claim.comparison} {_number(claim.target)}",
            claim.unit,
            claim.kind,
            "[green]holds[/]" if claim.holds else "[red]missed[/]",
        )
    console.print(table)


def _number(value: int | float | bool | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _plain(value: object) -> object:
    if isinstance(value, Claim):
        return value.row()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{value!r} has no place in summary.json")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that runs, "+" for changes on top of it."""
    root = Path(__file__).parent.parent
    command = [
        "git",
        "-C",
        str(root),
        "describe",
        "--always",
        "--abbrev=40",
        "--dirty=+",
    ]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout[:-1]
    except (OSError, subprocess.CalledProcessError):
        return None
