"""Everything that is measured on a device, part by part, in one command.

    cachedattn run configs/h200.gin                  one H200 or H100, 9 minutes
    ... --gin_bindings 'device.run.is_resuming = True'     what is missing of it

Each part is an experiment with a run directory of its own under this one. A part that
fails takes nothing with it; what was measured stays, and a run that resumes keeps it.
"""

import dataclasses
import gc
import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence

import jax
from rich.console import Console

from cachedattn_jax.run_directory import Claim, RunDirectory, claims_of, environment

Part = Callable[[RunDirectory], Mapping[str, object]]
# What a part must share with this run to be kept.
_SAME = ("commit", "versions", "device")


def run(
    run_directory: RunDirectory,
    *,
    parts: Mapping[str, Part],
    only: Sequence[str] = (),
    is_resuming: bool = False,
    seconds: float = 540.0,
) -> dict:
    """Measures the parts, in order.

    Args:
        only: names of parts; none for all.
        is_resuming: parts that are complete in the run directory, of the same commit,
            versions and device, are kept instead of measured again.
        seconds: no part begins later than so long after the first.

    Raises:
        ValueError: a name is not one of the parts.
    """
    for name in only:
        if name not in parts:
            raise ValueError(f"only={name!r} is not one of {', '.join(parts)}")
    console = Console()
    run_directory.open()
    facts = {**environment(), "device": jax.devices()[0].device_kind}
    started = time.monotonic()
    done: dict[str, dict] = {}
    missing: dict[str, str] = {}
    for name in only or parts:
        folder = run_directory.path / name
        kept = _kept(folder, facts) if is_resuming else None
        if kept is not None:
            console.print(f"{name}: kept, measured {kept['started']}", highlight=False)
            done[name] = kept
            continue
        if time.monotonic() - started > seconds:
            missing[name] = f"not begun after {seconds:g} s"
            continue
        console.rule(name)
        try:
            done[name] = _measure(parts[name], RunDirectory(folder), facts)
            console.print(f"{name}: {done[name]['seconds']:.0f} s", highlight=False)
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}"
            console.print(traceback.format_exc(), highlight=False, markup=False)
        gc.collect()  # pools and engines hold each other, and all device memory
    for name, reason in missing.items():
        console.print(f"{name} is missing: {reason}", highlight=False, markup=False)
    return {
        **facts,
        "seconds": time.monotonic() - started,
        "missing": missing,
        "parts": done,
        "claims": _claims(done, len(only or parts)),
    }


def _measure(part: Part, directory: RunDirectory, facts: Mapping) -> dict:
    """Runs a part and writes its summary, which says that it is complete."""
    started, begun = time.monotonic(), environment()["started"]
    summary = part(directory)
    claims = [claim.row() for claim in claims_of(summary)]
    whole = {
        **{name: facts[name] for name in _SAME},
        "started": begun,
        "seconds": time.monotonic() - started,
        **summary,
        "claims": claims,
    }
    directory.write_summary(whole)
    return json.loads((directory.path / "summary.json").read_text())


def _kept(folder, facts: Mapping) -> dict | None:
    try:
        found = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    is_same = all(found.get(name) == facts[name] for name in _SAME)
    return found if is_same and "claims" in found else None


def _claims(done: Mapping[str, dict], num_parts: int) -> list[Claim]:
    names = {field.name for field in dataclasses.fields(Claim)}
    claims = [
        Claim(**{k: v for k, v in row.items() if k in names})
        for row in (
            {**claim, "name": f"{part}: {claim['name']}"}
            for part, summary in done.items()
            for claim in summary["claims"]
        )
    ]
    complete = Claim(
        name="parts measured", value=len(done), target=num_parts, comparison="=="
    )
    return [*claims, complete]
