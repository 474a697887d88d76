"""An experiment of no time at all."""

from cachedattn_jax.run_directory import Claim, InvariantBroken, RunDirectory
from cachedattn_jax.store.budget import StoreConfig


def run(
    run_directory: RunDirectory,
    *,
    factor: int = 1,
    store: StoreConfig | None = None,
    breaks: bool = False,
) -> dict[str, object]:
    """Claims that its factor is at least 3."""
    run_directory.append_turns([{"turn": 0, "factor": factor}])
    if breaks:
        raise InvariantBroken("token 3 differs")
    claim = Claim(name="factor", value=factor, target=3, unit="x")
    return {"factor": factor, "claims": [claim]}
