"""Cases of the kernels that several tests share: operations, who serves them, and examples."""

import functools

import jax
import jax.numpy as jnp
import kernels_oracle as oracle
import numpy as np
import pytest

from hyperlayer_jax import kernels

PRODUCTS = ("ell_spmm", "ell_spmm_transposed", "ell_sddmm", "spmm", "sddmm")
ATTENTIONS = ("gathered_attention", "block_attention", "causal_block_attention")
OPERATIONS = (*PRODUCTS, "redistribute", *ATTENTIONS)
# The operations of each backend. Kernels run interpreted where there is no device for them.
SERVED = [(backend, name) for backend in ("reference", "tpu") for name in OPERATIONS]
SERVED += [("cpu", name) for name in (*PRODUCTS, "redistribute", "lone_redistribute")]
SERVED += [(None, "ell_spmm"), (None, "block_attention"), ("reference", "lone_redistribute")]
SERVED += [("reference", "masked_block_attention"), ("triton", "gathered_attention")]
PLAIN = ("reference", "cpu", None)


def cases(pairs):
    """Interpreted kernels take long."""
    return [
        pytest.param(backend, name, marks=[] if backend in PLAIN else [pytest.mark.slow])
        for backend, name in pairs
    ]


# All backends share their rules of batching and sharding: of kernels, one of each kind will do.
SHARED = [
    served
    for served in SERVED
    if served[0] in PLAIN
    or served[1] in ("ell_spmm", "sddmm", "redistribute", "gathered_attention", "block_attention")
]

contract = pytest.mark.parametrize("implementation, name", cases(SERVED))
operations = pytest.mark.parametrize("name", (*OPERATIONS, "lone_redistribute"))

BLOCK = 8


@functools.cache
def example(name, batch=(2, 3), *, i=5, j=7, p=3, n=11, d=4, dtype=jnp.float32):
    """(function, positions, floats, oracle) of one operation: function(positions, floats) is
    compared with oracle(*floats). Positions run from 2 below their axis to 2 beyond it, and repeat.
    The same for the same arguments, so that tests share what they compile.
    """
    rng = np.random.default_rng(0)

    def position(size, *shape):
        return jnp.asarray(rng.integers(-2, size + 2, (*batch, *shape)), jnp.int32)

    def operand(*shape):
        return jnp.asarray(rng.standard_normal((*batch, *shape)), dtype)

    sizes = {}
    if name.endswith("redistribute"):
        p = min(p, 1) if name.startswith("lone") else p
        positions = (position(j, n, 2), jnp.asarray(rng.random((*batch, n)) < 0.8))
        floats = (operand(p, 2) + j // 2, jnp.exp(operand(p, 2) / 2), operand(p))

        def call(points, where, *floats, **options):
            return kernels.redistribute(points, *floats, where=where, **options)

        def expected(*floats):
            return oracle.redistribute(positions[0], *floats, np.asarray(positions[1]))

    elif name.endswith("attention"):
        by_block = name != "gathered_attention"
        block = BLOCK if by_block else 1
        positions = (position(j, i, p),)
        absent = rng.random((*batch, i, p)) < 0.2
        q, k, v = operand(i * block, d + 1), operand(j * block, d + 1), operand(j * block, d)
        floats = (q, k, v, jnp.where(absent, -jnp.inf, operand(i, p)))
        sizes = {"scale": 0.5}
        if by_block:
            sizes |= {"block": block, "causal": name.startswith("causal")}
        if name.startswith("masked"):
            positions += (jnp.asarray(rng.random((*batch, j * block)) < 0.6),)
        operation = kernels.block_attention if by_block else kernels.gathered_attention

        def call(indices, *rest, **options):
            if name.startswith("masked"):
                options["mask"], *rest = rest
            return operation(*rest[:3], indices, rest[3], **options)

        def expected(q, k, v, log_weights):
            reference = oracle.block_attention if by_block else oracle.gathered_attention
            options = dict(sizes)
            q = np.asarray(q, np.float64) * options.pop("scale")
            if name.startswith("masked"):
                options["mask"] = np.asarray(positions[1])
            return reference(q, k, v, np.asarray(positions[0]), log_weights, **options)

    else:
        call = getattr(kernels, name)
        by_row = name.startswith("ell")
        positions = (position(j, i, p),) if by_row else (position(i, n), position(j, n))
        rows, cols = map(np.asarray, oracle.ell_entries(positions[0]) if by_row else positions)
        entries = positions[0].shape[len(batch) :]
        values, left, right = operand(*entries), operand(i, d), operand(j, d)

        if name.endswith("sddmm"):
            floats = (left, right)

            def expected(left, right):
                return oracle.sddmm(rows, cols, left, right).reshape(*batch, *entries)

        elif name == "ell_spmm_transposed":
            floats, sizes = (values, left), {"num_cols": j}

            def expected(values, left):
                return oracle.spmm(cols, rows, np.reshape(values, rows.shape), left, j)

        else:
            floats, sizes = (values, right), {} if by_row else {"num_rows": i}

            def expected(values, right):
                return oracle.spmm(rows, cols, np.reshape(values, rows.shape), right, i)

    def function(positions, floats, **options):
        return call(*positions, *floats, **sizes, **options)

    return function, positions, floats, expected


@functools.cache
def compiled(function, **options):
    """The result and its gradients for a cotangent, jitted once for all tests."""

    @jax.jit
    def run(positions, floats, cotangent):
        out, vjp = jax.vjp(lambda f: function(positions, f, **options), floats)
        return out, vjp(cotangent)[0]

    return run


def value_and_vjp(function, positions, floats, cotangent=None, **options):
    """The result and its gradients for `cotangent`, by default the result itself."""
    run = compiled(function, **options)
    if cotangent is None:
        cotangent = run(positions, floats, like(function, positions, floats, 0))[0]
    return run(positions, floats, cotangent)


def like(function, positions, floats, value):
    """An array like the result, with `value` everywhere."""
    return jnp.full_like(jax.eval_shape(function, positions, floats), value)


def assert_close(actual, expected, dtype=jnp.float32):
    tolerance = {"bfloat16": 2e-2, "float32": 1e-5, "float64": 1e-12}[jnp.dtype(dtype).name]
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), np.asarray(expected, np.float64), tolerance, tolerance
    )


def assert_close_each(arrays, expected):
    for array, wanted in zip(arrays, expected, strict=True):
        np.testing.assert_allclose(array, wanted, 1e-4, 1e-4)
