"""The boundary to gin: files and bindings in, a callable experiment out.

Knows gin, and is the only module that does. Does not know what an experiment is made
of.

A .gin file imports what it configures and names its experiment:

    from __gin__ import dynamic_registration
    from cachedattn_jax import config
    from experiments import reuse

    config.Experiment.run = @reuse.run
    reuse.run.seed = 3
"""

import difflib
import importlib.util  # noqa: F401  gin 0.5 uses it without importing it
import inspect
import logging
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import no_type_check

import gin


@no_type_check  # gin passes what users write; checked here in words of ours
@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What `cachedattn run` runs.

    Attributes:
        run: called with the run directory; returns the summary, claims included.
    """

    run: Callable[..., dict[str, object]]

    def __post_init__(self) -> None:
        if not callable(self.run):
            raise ValueError(
                f"config.Experiment.run={self.run!r} must be a reference: @module.run"
            )


def load(files: Sequence[str], bindings: Sequence[str]) -> Experiment:
    """Reads files and bindings, later ones winning, and returns their experiment.

    Raises:
        ValueError: a name or a value is wrong; one sentence with the nearest right
            name.
    """
    # Like `python -m`: a checkout's experiments are importable without being installed.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for file in files:
        if not os.path.isfile(file):
            raise ValueError(f"there is no file {file!r}; see configs/ for examples")
    # It logs an error for each place that an include is not in.
    logging.getLogger().setLevel(logging.CRITICAL)
    gin.clear_config()
    try:
        gin.parse_config_files_and_bindings(list(files), list(bindings))
        return gin.get_configurable(Experiment)()
    except (
        ValueError,
        TypeError,
        NameError,
        AttributeError,
        ImportError,
        SyntaxError,
        OSError,
        RuntimeError,
    ) as error:
        raise ValueError(_sentence(error, files, bindings)) from error


def config_text() -> str:
    """All bindings that were read."""
    return gin.config_str()


def operative_text() -> str:
    """All parameters that were used, defaults included; running it repeats the run."""
    return gin.operative_config_str()


def _sentence(error: Exception, files: Sequence[str], bindings: Sequence[str]) -> str:
    """The first line of gin's message, where it is, and the nearest right name."""
    lines = str(error).splitlines()
    place = next((line.strip() for line in lines if re.search(r"line \d+", line)), "")
    message = lines[0].strip() if lines else type(error).__name__
    wrong, candidates = _alternatives(message, files, bindings)
    if message.startswith("Couldn't resolve selector"):
        message = f"{wrong!r} does not exist"
    if match := re.match(r"No bindings specified for '(.*)/gin.macro'", message):
        message = f"the macro {match[1]!r} is used but not set"
    if "required keyword-only argument: 'run'" in message:
        message = "no experiment is named; bind config.Experiment.run = @module.run"
    message = message.rstrip(".")
    if place and place not in message:
        message += f" ({place[0].lower()}{place[1:].rstrip(':')})"
    nearest = difflib.get_close_matches(wrong, candidates, n=1, cutoff=0.4)
    return message + (f"; did you mean {nearest[0]!r}?" if nearest else "")


def _alternatives(
    message: str, files: Sequence[str], bindings: Sequence[str]
) -> tuple[str, Iterable[str]]:
    """The wrong name in a message of gin's, and the names it could have been."""
    if match := re.search(
        r"'([\w.]+)' doesn't have a parameter named '(\w+)'", message
    ):
        return match[2], _parameters(match[1])
    if match := re.search(r"<module '([\w.]+)'.* has no attribute (\w+)", message):
        return match[2], dir(sys.modules[match[1]])
    if match := re.search(r"'(\w+)' was not provided by an import", message):
        return match[1], _imported(files, bindings)
    if match := re.search(r"No module named '(?:([\w.]+)\.)?(\w+)'", message):
        package = sys.modules.get(match[1] or "")
        paths = getattr(package, "__path__", [])
        return match[2], [module.name for module in pkgutil.iter_modules(paths)]
    return "", []


def _parameters(selector: str) -> list[str]:
    module_name, _, name = selector.rpartition(".")
    for path, module in list(sys.modules.items()):
        if path == module_name or path.endswith(f".{module_name}"):
            if (found := getattr(module, name, None)) is not None:
                return list(inspect.signature(found).parameters)
    return []


def _imported(files: Sequence[str], bindings: Sequence[str]) -> list[str]:
    text = "\n".join(bindings)
    for path in files:
        with open(path) as file:
            text += "\n" + file.read()
    return re.findall(r"^\s*(?:from \S+ )?import (?:\S+ as )?(\w+)", text, re.MULTILINE)
