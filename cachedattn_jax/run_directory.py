"""What a run leaves behind, and the claims it ends with.

Knows files and tables. Does not know experiments, engines or gin.

    environment.json  config.gin  operative.gin  turns.jsonl
    timeline.json.gz  report.html  summary.json (last, and whole)
"""

import dataclasses
import datetime
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
from typing import Literal, get_args, no_type_check

import numpy as np
from rich.console import Console
from rich.table import Table

from cachedattn_jax import __version__

_ENVIRONMENT = "environment.json"
# What a run removes when it starts over; nothing else in the folder is touched.
_FILES = (
    "config.gin",
    "operative.gin",
    "turns.jsonl",
    "timeline.json.gz",
    "report.html",
    "summary.json",
)
_PACKAGES = ("jax", "jaxlib", "flax", "tensorstore", "numpy")

Comparison = Literal[">=", "<=", "=="]
Kind = Literal["measured", "emulated", "simulated"]
Value = bool | int | float | np.bool_ | np.integer | np.floating


class InvariantBroken(Exception):
    """A run found a result that no correct program gives."""


# Experiments fill in what they computed: __post_init__ answers in words.
@no_type_check
@dataclass(frozen=True, kw_only=True)
class Claim:
    """One number of a run held against its target: value >= target, for example.

    Attributes:
        value: None where the run could not tell; the claim does not hold then.
        kind: whether real work was timed or counted, timed with emulated links, or
            computed by a simulator.
    """

    name: str
    value: Value | None
    target: Value
    comparison: Comparison = ">="
    unit: str = ""
    kind: Kind = "measured"

    def __post_init__(self) -> None:
        for name, allowed in (("comparison", Comparison), ("kind", Kind)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be one of {get_args(allowed)}"
                )

    @property
    def holds(self) -> bool:
        if self.value is None:
            return False
        match self.comparison:
            case ">=":
                return bool(self.value >= self.target)
            case "<=":
                return bool(self.value <= self.target)
            case "==":
                return bool(self.value == self.target)

    def row(self) -> dict[str, object]:
        """The claim as summary.json has it."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: _plain(value) for name, value in fields.items()} | {
            "holds": self.holds
        }


class RunDirectory:
    """The folder of one run.

    Nothing is written or removed before the run writes its first file, so that a
    mistake found until then leaves the folder as it was.

    Args:
        config: text of config.gin.
        facts: noted in environment.json beside versions, machine and commit.

    Raises:
        ValueError: the folder cannot be used, or holds files of something else.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        config: str = "",
        facts: Mapping[str, object] | None = None,
    ) -> None:
        self.path = Path(path)
        self.is_open = False
        self._config = config
        self._facts = facts or {}
        _check_usable(self.path)

    def open(self) -> None:
        """Makes the folder, in place of an earlier run; whatever writes calls this."""
        if self.is_open:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self.is_open = True
        # First, so that the folder is known as a run's however this one ends.
        self.write_json(_ENVIRONMENT, {**environment(), **self._facts})
        for name in _FILES:
            (self.path / name).unlink(missing_ok=True)
        self.write_text("config.gin", self._config)

    def fresh_folder(self, name: str) -> Path:
        """An empty folder inside; what an earlier run left in it is removed."""
        self.open()
        folder = self.path / name
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise ValueError(f"{str(folder)!r} is not a folder of a run; move it away")
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        return folder

    def write_text(self, name: str, text: str) -> None:
        """Writes a file whole: a reader sees the old one or the new one."""
        self.open()
        part = self.path / f".{name}.part"
        part.write_text(text)
        part.replace(self.path / name)

    def write_json(self, name: str, value: object) -> None:
        """Writes strict JSON: dataclasses become objects, NaN becomes null."""
        self.write_text(name, json.dumps(_plain(value), indent=1, allow_nan=False))

    def append_turns(self, rows: Sequence[Mapping[str, object]]) -> None:
        """Adds rows to turns.jsonl."""
        self.open()
        with (self.path / "turns.jsonl").open("a") as file:
            file.writelines(json.dumps(_plain(row)) + "\n" for row in rows)

    def write_timeline(self, trace: Mapping[str, object]) -> None:
        """Writes a Chrome trace, which Perfetto opens too."""
        self.open()
        with gzip.open(self.path / "timeline.json.gz", "wt") as file:
            json.dump(trace, file)

    def write_summary(self, summary: Mapping[str, object]) -> None:
        """Writes summary.json, which says that the run is complete."""
        self.write_json("summary.json", summary)


def claims_of(summary: Mapping[str, object]) -> list[Claim]:
    """The claims of a summary, which has to have some."""
    claims = summary.get("claims")
    if not isinstance(claims, list) or not all(isinstance(c, Claim) for c in claims):
        raise TypeError(
            "an experiment returns a summary with 'claims', a list of Claim"
        )
    return claims


def print_claims(claims: Sequence[Claim], console: Console) -> None:
    """The table a run ends with."""
    table = Table(title="Claims", title_justify="left")
    table.add_column("claim")
    table.add_column("value", justify="right")
    table.add_column("target", justify="right")
    for name in ("unit", "kind", "holds"):
        table.add_column(name)
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


def environment() -> dict[str, object]:
    """What a result depends on beside its configuration."""
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": _commit(),
        "versions": versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "num_cpus": os.cpu_count(),
    }


def versions() -> dict[str, str | None]:
    """This version, and those of the installed packages that results depend on."""
    return {"cachedattn_jax": __version__} | {
        name: _version(name) for name in _PACKAGES
    }


def _check_usable(path: Path) -> None:
    try:
        names = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    except OSError as error:
        raise ValueError(
            f"output_dir={str(path)!r} cannot be used: {error.strerror}"
        ) from error
    if names and not _is_run(path):
        raise ValueError(
            f"output_dir={str(path)!r} holds files that no run wrote, such as"
            f" {names[0]!r}; name an empty folder or a new one"
        )
    existing = next(
        parent for parent in (path, *path.absolute().parents) if parent.exists()
    )
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"output_dir={str(path)!r} is not writable")


def _is_run(path: Path) -> bool:
    try:
        written = json.loads((path / _ENVIRONMENT).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(written, dict) and {"command", "commit", "versions"} <= set(
        written
    )


def _number(value: Value | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3f}"


def _plain(value: object) -> object:
    """The value in types that strict JSON has."""
    if isinstance(value, Claim):
        return value.row()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that runs, with a "+" for changes on top of it."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():  # installed, maybe inside another checkout
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--exclude=*"]
    command += ["--abbrev=40", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
