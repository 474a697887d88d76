"""How a command ends: what its exit codes mean, and one sentence for a mistake."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def exit_codes(debug: bool = False) -> Iterator[None]:
    """1 for a broken invariant, 2 for the user's mistake.

    Args:
        debug: lets a mistake through, to show where in the code it was found.
    """
    from cachedattn_jax.run_directory import InvariantBroken

    try:
        yield
    except InvariantBroken as error:
        typer.echo(f"cachedattn: broken invariant: {error}", err=True)
        raise typer.Exit(1) from None
    except ValueError as error:
        if debug:
            raise
        typer.echo(f"cachedattn: error: {error}", err=True)
        raise typer.Exit(2) from None
