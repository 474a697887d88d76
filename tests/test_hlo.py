"""Bytes counted from a compiled program's text are those that the program must move."""

import jax
import jax.numpy as jnp
import pytest

from experiments.hlo import device_bytes, kernel_flops


def compiled_text(function, *shapes, donate=()) -> str:
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    jitted = jax.jit(function, donate_argnums=donate)
    return str(jitted.lower(*arguments).compile().as_text())


def test_a_product_reads_its_factors_and_writes_its_result():
    text = compiled_text(
        lambda a, b: a @ b, ((64, 128), jnp.float32), ((128, 32), jnp.float32)
    )
    assert device_bytes(text) == 4 * (64 * 128 + 128 * 32 + 64 * 32)


def test_pages_taken_from_a_pool_count_and_the_pool_does_not():
    text = compiled_text(
        lambda pool, slots: pool.at[slots].get(mode="clip"),
        ((1000, 64), jnp.float32),
        ((8,), jnp.int32),
    )
    moved = 2 * 8 * 64 * 4
    assert moved <= device_bytes(text) <= moved + 1000


def test_pages_put_into_a_pool_count_and_the_pool_does_not():
    text = compiled_text(
        lambda pool, pages: jax.lax.dynamic_update_slice(pool, pages, (3, 0)),
        ((100_000, 64), jnp.float32),
        ((8, 64), jnp.float32),
        donate=(0,),
    )
    moved = 2 * 8 * 64 * 4
    assert moved <= device_bytes(text) <= moved + 1000


ON_CHIP = """HloModule m

ENTRY %main (a: bf16[8,128], pool: bf16[64,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %pool = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(1)
  %copy-start = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, bf16[8,128]{1,0}, u32[]{:S(2)}) \
copy-start(%a)
  %copy-done = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %negate = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} negate(%copy-done)
  ROOT %kernel = bf16[8,128]{1,0} custom-call(%negate, %pool), \
custom_call_target="tpu_custom_call", backend_config={"cost_estimate":\
{"flops":"77","transcendentals":"0","bytes_accessed":"1000"}}
}
"""


def test_on_chip_memory_is_free_and_kernels_count_what_they_say():
    assert device_bytes(ON_CHIP) == 8 * 128 * 2 + 1000
    assert kernel_flops(ON_CHIP) == 77


def test_a_text_without_an_entry_is_no_program():
    with pytest.raises(AssertionError, match="no entry"):
        device_bytes("HloModule m")
