"""Everything that is measured on a device, part by part, in one command.

    cachedattn run configs/h200.gin                  one H200 or H100, under 9 minutes
    ... --gin_bindings 'device.run.is_resuming = True'     what is missing of it

Each part is an experiment with a run directory of its own under this one, and with a
time of its own: what it has not begun by then it leaves out. A part that fails takes
nothing with it; what was measured stays, and a run that resumes keeps it.
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

# What measures, and the seconds it may take; it is called with `seconds`, too.
Part = tuple[Callable[..., Mapping[str, object]], float]
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
        parts: by name, what measures and the seconds that it may take.
        only: names of parts; none for all.
        is_resuming: parts that are complete in the run directory, of the same commit,
            versions and device, are kept instead of measured again.
        seconds: of all parts together.

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
        measure, most_s = parts[name]
        left_s = seconds - (time.monotonic() - started)
        if left_s <= 0:
            missing[name] = f"not begun after {seconds:g} s"
            continue
        console.rule(name)
        try:
            directory, limit_s = RunDirectory(folder), min(most_s, left_s)
            done[name] = found = _measure(measure, directory, limit_s, facts)
            taken = f"{found['seconds']:.0f} s of {most_s:g}"
            console.print(f"{name}: {taken}", highlight=False)
            if found["left_out"]:
                missing[name] = f"out of time for {', '.join(found['left_out'])}"
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
        "claims": _claims(done, len(missing)),
    }


def _measure(
    measure: Callable, directory: RunDirectory, limit_s: float, facts: Mapping
) -> dict:
    """Runs a part and writes its summary, which says whether it is complete."""
    started, begun = time.monotonic(), environment()["started"]
    summary = measure(directory, seconds=limit_s)
    claims = [claim.row() for claim in claims_of(summary)]
    whole = {
        **{name: facts[name] for name in _SAME},
        "started": begun,
        "seconds": time.monotonic() - started,
        "left_out": [],
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
    is_complete = "claims" in found and not found.get("left_out")
    return found if is_same and is_complete else None


def _claims(done: Mapping[str, dict], num_missing: int) -> list[Claim]:
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
        name="parts missing or cut off", value=num_missing, target=0, comparison="=="
    )
    return [*claims, complete]
