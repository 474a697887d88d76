"""How tests run: on CPU, with strict dtypes, compiled programs kept between runs."""

import os
from pathlib import Path

_CACHE = Path(__file__).parent.parent / ".cache" / "xla"
# Read by jax when it is imported. NPROC: with 2 cores jax 0.10 starves collectives.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
