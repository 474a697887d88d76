"""Attention and page moves on arrays that hold relocatable pages. Knows jax only."""
