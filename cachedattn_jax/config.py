"""The boundary to gin: files and bindings in, an experiment that can be started out.

Knows gin, and is the only module that does. Does not know what experiments do.

A .gin file imports what it configures and names its experiment. Each file enables
dynamic registration itself, so that no other module has to know gin:

    from __gin__ import dynamic_registration
    from cachedattn_jax import config
    from experiments import reuse

    config.Experiment.run = @reuse.run
    reuse.run.seed = 3
"""

import copy
import importlib.util  # noqa: F401  gin 0.5 uses it without importing it
import inspect
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import no_type_check

import gin

from cachedattn_jax.config_mistakes import (
    Line,
    binding_place,
    check_macros,
    imports,
    read_lines,
    sentence,
)


# Holds what a user wrote in a file, of any type: __post_init__ answers in words.
@no_type_check
@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What a .gin file names.

    Attributes:
        run: called with the run directory; returns the summary, `claims` included.
    """

    run: Callable[..., Mapping[str, object]]

    def __post_init__(self) -> None:
        if not callable(self.run):
            raise ValueError(f"run={self.run!r} must be a reference such as @reuse.run")


@dataclass(frozen=True, kw_only=True)
class LoadedExperiment:
    """An experiment, ready to start, and the lines that set its parameters."""

    run: Callable[..., Mapping[str, object]]
    lines: Sequence[Line]

    @property
    def seed(self) -> object:
        """The value of the parameter `seed`; None where there is no such parameter."""
        bound = gin.get_bindings(self.run, resolve_references=False)
        if "seed" in bound:
            return copy.deepcopy(bound["seed"])  # how gin resolves a macro
        parameter = inspect.signature(self.run).parameters.get("seed")
        return None if parameter is None else parameter.default

    def start(self, run_directory: object) -> Mapping[str, object]:
        """Runs the experiment and returns its summary.

        Raises:
            ValueError: a value is wrong or missing; the experiment was not entered.
        """
        try:
            return self.run(run_directory)
        except Exception as error:
            # gin makes all arguments before it calls the function.
            code = getattr(inspect.unwrap(self.run), "__code__", None)
            walked = traceback.walk_tb(error.__traceback__)
            if code and code not in [frame.f_code for frame, _ in walked]:
                raise ValueError(sentence(error, self.lines)) from error
            # gin raises a copy with a longer message; its context is the original.
            original = error.__context__ or error
            raise original from original.__cause__


def load(files: Sequence[str], bindings: Sequence[str] = ()) -> LoadedExperiment:
    """Reads files, then bindings, later ones winning, and returns their experiment.

    A binding may use every name that the files import.

    Raises:
        ValueError: a name is wrong or missing; says where, and the nearest right name.
    """
    # Like `python -m`: the experiments of a checkout need not be installed.
    if sys.path[:1] != [os.getcwd()]:
        sys.path.insert(0, os.getcwd())
    lines = read_lines(files, bindings)
    gin.clear_config()
    for file in files:
        with _mistakes_explained(lines, file):
            gin.parse_config_file(file)
    for binding in bindings:
        with _mistakes_explained(lines, binding_place(binding)):
            gin.parse_config([*imports(lines), binding])
    with _mistakes_explained(lines):
        gin.finalize()
        check_macros(lines)
        run = _named_experiment(lines)
    return LoadedExperiment(run=run, lines=lines)


def config_str() -> str:
    """All bindings that were read."""
    return gin.config_str()


def operative_str() -> str:
    """All parameters that were used, defaults included; running it repeats the run."""
    return gin.operative_config_str()


def _named_experiment(lines: Sequence[Line]) -> Callable[..., Mapping[str, object]]:
    # gin knows the class only once a file has used it.
    if not any("Experiment" in line.code for line in lines):
        raise ValueError(
            "no experiment is named; a file binds config.Experiment.run = @module.run"
        )
    return gin.get_configurable(Experiment)().run


@contextmanager
def _mistakes_explained(
    lines: Sequence[Line], place: str | None = None
) -> Iterator[None]:
    level = logging.root.level
    logging.root.setLevel(logging.CRITICAL)  # gin logs every path that it tries
    try:
        yield
    except Exception as error:
        raise ValueError(sentence(error, lines, place)) from error
    finally:
        logging.root.setLevel(level)
