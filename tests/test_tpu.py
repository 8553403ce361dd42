"""The TPU kernels where they are not like other backends: blocks, limits, and equal bits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels_cases import OPERATIONS, example, value_and_vjp

from hyperlayer_jax import kernels
from hyperlayer_jax.kernels.attention import tpu as attention
from hyperlayer_jax.kernels.products import tpu as products
from hyperlayer_jax.kernels.redistribution import tpu as redistribution


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_any_number_of_blocks(name, monkeypatch):
    """Several blocks of rows, points and keys, the last of them ragged; and the same bits twice."""
    monkeypatch.setattr(products, "BLOCK_ENTRIES", 24)
    monkeypatch.setattr(redistribution, "_POINTS", 128)
    monkeypatch.setattr(attention, "_KEYS", 16)
    function, positions, floats, _ = example(name, (2,), i=13, j=300, p=11, n=290)
    out, gradients = value_and_vjp(function, positions, floats, implementation="tpu")
    again = value_and_vjp(function, positions, floats, implementation="tpu")
    jax.tree.map(np.testing.assert_array_equal, (out, gradients), again)
    plain = value_and_vjp(function, positions, floats, implementation="reference")
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, 1e-4, 1e-4), (out, gradients), plain)


def test_what_it_lacks_has_a_name():
    def products(i, p, j, d, dtype=jnp.float32):
        return {
            "indices": jax.ShapeDtypeStruct((2, i, p), jnp.int32),
            "values": jax.ShapeDtypeStruct((2, i, p), dtype),
            "dense": jax.ShapeDtypeStruct((2, j, d), dtype),
        }

    def blocks(t, block):
        operands = dict.fromkeys("qkv", jax.ShapeDtypeStruct((2, t, 64), jnp.bfloat16))
        entries = (2, t // block, 3)
        return operands | {
            "block_indices": jax.ShapeDtypeStruct(entries, jnp.int32),
            "log_weights": jax.ShapeDtypeStruct(entries, jnp.bfloat16),
        }

    def spmm(**operands):
        return kernels.ell_spmm(**operands, implementation="tpu")

    def attention(block):
        def run(**operands):
            call = lambda q: kernels.block_attention(  # noqa: E731
                **operands | {"q": q}, block=block, causal=True, implementation="tpu"
            )
            return jax.vjp(call, operands["q"])[1](operands["v"])

        return run

    cases = {
        "p = 4097 is above 4096, what SMEM holds of a row": (spmm, products(5, 4097, 7, 4)),
        "VMEM keeps 96 MiB of operands, not the 98 MiB of these": (
            spmm,
            products(5, 3, 200000, 128),
        ),
        "block = 12 is no multiple of 8 up to 128": (attention(12), blocks(120, 12)),
        "block = 256 is no multiple of 8 up to 128": (attention(256), blocks(1024, 256)),
        "VMEM keeps 96 MiB of operands, not the 192 MiB of these": (
            attention(64),
            blocks(2**17, 64),
        ),
    }
    for message, (call, operands) in cases.items():
        with pytest.raises(NotImplementedError, match=re.escape(f"got 'tpu', but {message}")):
            jax.eval_shape(call, **operands)
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="a TPU has no float64"):
        jax.eval_shape(spmm, **products(5, 3, 7, 4, jnp.float64))
