"""`python -m cachedattn_jax` is the command `cachedattn`."""

from cachedattn_jax.cli import main

main()
