"""Laws of the ELL products on Mosaic GPU, interpreted, against the float64 oracle."""

import jax
import jax.numpy as jnp
import kernels_oracle as oracle
import numpy as np
import pytest
from test_kernels_mosaic_gpu import interpreted, interpreted_or_real  # noqa: F401

from hyperlayer_jax import kernels
from hyperlayer_jax.kernels.products import mosaic_gpu

# Members of the batch, rows, entries of a row, columns, features, dtype.
CASES = {
    "a row more than a tile": (2, 65, 3, 20, 32, jnp.float32),
    "less than a tile, 16 bits": (1, 5, 4, 7, 128, jnp.bfloat16),
}


def example(case, operation):
    """(operands, oracle): indices run beyond both ends, and what none selects is not a number."""
    b, i, p, j, d, dtype = CASES[case]
    rng = np.random.default_rng(0)
    indices = rng.integers(-3, j + 3, (b, i, p))
    indices[indices == 0] = -1
    dense = rng.standard_normal((b, j, d))
    dense[:, 0] = np.nan
    other = rng.standard_normal((b, i, p) if operation == "ell_spmm" else (b, i, d))
    operands = jnp.asarray(indices, jnp.int32), jnp.asarray(other, dtype), jnp.asarray(dense, dtype)
    rows, cols = oracle.ell_entries(indices)
    other, dense = operands[1:]
    if operation == "ell_spmm":
        return operands, oracle.spmm(rows, cols, np.reshape(other, rows.shape), dense, i)
    return operands, oracle.sddmm(rows, cols, other, dense).reshape(indices.shape)


@pytest.mark.slow
@interpreted_or_real
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("operation", ["ell_spmm", "ell_sddmm"])
def test_agrees_with_the_oracle(operation, case):
    operands, expected = example(case, operation)
    run = jax.jit(getattr(mosaic_gpu, operation), static_argnames="interpret")
    actual = run(*operands, interpret=True)
    assert actual.dtype == operands[2].dtype
    tolerance = 1e-5 if actual.dtype == jnp.float32 else 2**-7
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, tolerance, tolerance)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dtype": jnp.float64}, "it sums bfloat16 and float32, got float64"),
        ({"d": 16}, "it copies rows of a multiple of 128 bytes, got 64"),
        ({"d": 160}, "it holds at most 128 features, got 160"),
        ({"p": 400, "d": 32}, "p = 400 needs 229376 bytes of shared memory, of 225280"),
        ({"b": 65536}, "its grid holds a batch of at most 65535, got 65536"),
    ],
)
def test_says_what_it_lacks(changes, message):
    b, p, d, dtype = ({"b": 1, "p": 2, "d": 64, "dtype": jnp.float32} | changes).values()
    with jax.enable_x64(True):
        shapes = [
            jax.ShapeDtypeStruct((b, 3, *shape), dtype)
            for shape, dtype in [((p,), jnp.int32), ((p,), dtype), ((d,), dtype)]
        ]
        function = lambda *a: kernels.ell_spmm(*a, implementation="mosaic_gpu")  # noqa: E731
        with pytest.raises(NotImplementedError, match=message):
            jax.eval_shape(function, *shapes)
