"""How tests run: on CPU, with strict dtypes, compiled programs kept between runs."""

import os
import sys
from pathlib import Path

import pytest

_CACHE = Path(__file__).parent.parent / ".cache" / "xla"
# Read by jax when it is imported. NPROC: with 2 cores jax 0.10 starves collectives.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

_TOY = """
from dataclasses import dataclass

from cachedattn_jax.run_directory import Claim, InvariantBroken


@dataclass(frozen=True, kw_only=True)
class SizeConfig:
    size: int = 3

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size={self.size} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class OtherConfig(SizeConfig):
    pass


def run(run_directory, *, sizes, seed=0, fails=""):
    run_directory.append_turns([{"turn": 0, "size": sizes.size}])
    if fails == "invariant":
        raise InvariantBroken("token 3 differs")
    if fails == "bug":
        raise RuntimeError("unexpected")
    if fails == "mistake":
        raise ValueError("the window is too short")
    return {"number": 10 * sizes.size + seed,
            "claims": [Claim(name="size", value=sizes.size, target=3)]}
"""

TOY_GIN = """\
from __gin__ import dynamic_registration
from cachedattn_jax import config
from toy_experiments import toy

config.Experiment.run = @toy.run
toy.run.sizes = @toy.SizeConfig()
"""


@pytest.fixture(scope="session")
def _toy_package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "toy_experiments").mkdir()
    (folder / "toy_experiments" / "toy.py").write_text(_TOY)
    (folder / "toy_experiments" / "__init__.py").touch()
    return folder


@pytest.fixture
def toy(_toy_package, monkeypatch):
    """Writes toy.gin in a checkout with one small experiment, and works from there."""
    monkeypatch.chdir(_toy_package)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def write(*lines: str) -> str:
        Path("toy.gin").write_text(TOY_GIN + "\n".join(lines) + "\n")
        return "toy.gin"

    return write
