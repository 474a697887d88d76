"""Rotation tables: exact far out, and a group."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rope import rope_tables, rotate
from tests.paged_inputs import inverse_frequencies, rotate_absolute


@pytest.mark.parametrize("position", [0, 1, 63, 64, 1000, 131_071])
def test_offset_after_page_rotation_equals_the_absolute_rotation(position):
    tables = rope_tables(inverse_frequencies(64), page_tokens=64, num_pages=2048)
    x = np.random.default_rng(0).normal(size=(1, 3, 64))
    page, offset = divmod(position, 64)
    got = rotate(
        jnp.asarray(x, jnp.float32), tables.page_cos[page], tables.page_sin[page]
    )
    got = rotate(got, tables.offset_cos[offset], tables.offset_sin[offset])
    expected = rotate_absolute(x, np.asarray([position]))
    np.testing.assert_allclose(np.asarray(got), expected, atol=2e-6)


def test_rotation_keeps_the_dtype_and_computes_in_float32():
    tables = rope_tables(inverse_frequencies(8), page_tokens=4, num_pages=4)
    x = jnp.ones((2, 8), jnp.bfloat16)
    got = rotate(x, tables.offset_cos[3], tables.offset_sin[3])
    assert got.dtype == jnp.bfloat16
    expected = rotate_absolute(np.ones((2, 1, 8)), np.asarray([3, 3]))[:, 0]
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=2**-8)
