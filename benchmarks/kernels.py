"""The sparse products against dense matmul, gather + einsum and, on a CPU, BCOO and scipy.

`ell_spmm` has b matrices of i rows with p entries each, `spmm` b matrices of n entries anywhere in
i rows; j columns, times [j,d]. `+ backward` adds the gradients of values and dense.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax.experimental import sparse

from benchmarks import report
from benchmarks.accuracy import in_float32
from benchmarks.contenders import Contender, by_name, with_gradients
from benchmarks.timing import compare_all
from hyperlayer_jax import kernels

# Rows of 10 in 10000 columns; the glimpses of 128 images; attention over 32 of 1024 keys.
_ELL_SHAPES = {
    "cpu": (
        *({"b": 64, "i": 784, "p": 10, "j": 10000, "d": d} for d in (1, 16, 64)),
        *({"b": 256, "i": 144, "p": 12, "j": 784, "d": d} for d in (1, 3)),
        {"b": 8, "i": 1024, "p": 32, "j": 1024, "d": 64},
    ),
    "gpu": tuple(
        {"b": b, "i": 784, "p": 10, "j": 10000, "d": d}
        for b, d in ((256, 64), (512, 16), (2048, 1))
    ),
}
_SPMM_SHAPES = {
    "cpu": ({"b": 16, "i": 1024, "n": 8192, "j": 1024, "d": 16},),
    "gpu": tuple({"b": b, "i": 1024, "n": 8192, "j": 1024, "d": 64} for b in (64, 256)),
}
_SMALL_ELL = {"b": 2, "i": 32, "p": 4, "j": 64, "d": 8}
_SMALL_SPMM = {"b": 2, "i": 32, "n": 128, "j": 64, "d": 8}
_MAX_DENSE = 2**25


def cases(small: bool = False) -> Iterator[dict[str, Any]]:
    """Products of both layouts, forward and with gradients."""
    like = "cpu" if jax.default_backend() == "cpu" else "gpu"
    for dtype in (jnp.float32,) if like == "cpu" else (jnp.float32, jnp.bfloat16):
        for cases_of, each, one in (
            (_ell_cases, _ELL_SHAPES, _SMALL_ELL),
            (_spmm_cases, _SPMM_SHAPES, _SMALL_SPMM),
        ):
            shapes = (one,) if small else each[like]
            yield from compare_all(
                {name: case for s in shapes for name, case in cases_of(dtype, **s).items()}
            )


def _ell_cases(dtype, b, i, p, j, d):
    rng = np.random.default_rng(0)
    indices = rng.integers(0, j, (b, i, p), np.int32)
    values, dense = _normal(dtype, (b, i, p), (b, j, d))
    rows = np.broadcast_to(np.arange(i, dtype=np.int32)[:, None], (b, i, p))
    entries = [x.reshape(b, i * p) for x in (rows, indices, values)]

    def gather(indices, values, dense):
        picked = jax.vmap(lambda x, n: x[n])(dense, indices)
        return jnp.einsum("bip,bipd->bid", values, picked)

    arguments = (jnp.asarray(indices), values, dense)
    contenders = by_name("ell_spmm", kernels.ell_spmm, arguments, (1, 2))
    contenders["gather + einsum"] = Contender(gather, arguments, (1, 2))
    touched = sum(np.unique(batch).size for batch in indices)
    floats = values.size + touched * d + b * i * d
    nbytes = floats * values.dtype.itemsize + indices.nbytes
    name = f"ell_spmm {values.dtype.name} b={b} i={i} p={p} j={j} d={d}"
    return _both_ways(name, contenders, entries, dense, i, nbytes)


def _spmm_cases(dtype, b, i, n, j, d):
    rng = np.random.default_rng(0)
    rows, cols = (rng.integers(0, size, (b, n), np.int32) for size in (i, j))
    values, dense = _normal(dtype, (b, n), (b, j, d))

    def scatter(rows, cols, values, dense):
        def one(rows, cols, values, dense):
            return jnp.zeros((i, d), dense.dtype).at[rows].add(values[:, None] * dense[cols])

        return jax.vmap(one)(rows, cols, values, dense)

    spmm = functools.partial(kernels.spmm, num_rows=i)
    arguments = (jnp.asarray(rows), jnp.asarray(cols), values, dense)
    contenders = by_name("spmm", spmm, arguments, (2, 3))
    contenders["gather + scatter"] = Contender(scatter, arguments, (2, 3))
    nbytes = sum(x.nbytes for x in arguments) + b * i * d * values.dtype.itemsize
    name = f"spmm {values.dtype.name} b={b} i={i} n={n} j={j} d={d}"
    return _both_ways(name, contenders, (rows, cols, values), dense, i, nbytes)


def _normal(dtype, *shapes):
    """Drawn on the device: gigabytes in all."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def _both_ways(name, contenders, entries, dense, num_rows, nbytes):
    """The case forward, and with gradients: at least twice the bytes, and those of dense."""
    rows, cols, values = entries
    on_cpu = jax.default_backend() == "cpu"
    exact = next(value for label, value in contenders.items() if label.startswith("gather"))
    if on_cpu:
        arguments = (jnp.asarray(rows), jnp.asarray(cols), values, dense)
        bcoo = functools.partial(_bcoo, num_rows)
        contenders = contenders | {"BCOO": Contender(bcoo, arguments, (2, 3))}
    forward, both = dict(contenders), with_gradients(contenders)
    batch, num_cols, d = dense.shape
    if batch * num_rows * num_cols <= _MAX_DENSE:
        matrix = jnp.zeros((batch, num_rows, num_cols), values.dtype)
        matrix = matrix.at[np.arange(batch)[:, None], rows, cols].add(values)
        forward["dense matmul"] = Contender(jnp.matmul, (matrix, dense))
    if on_cpu:
        forward["scipy CSR"], both["scipy CSR"] = _scipy(rows, cols, values, dense, num_rows)
    flops = 2 * values.size * d
    options = {"nbytes": nbytes, "flops": flops, "expected": in_float32(exact)}
    options_of_both = {
        "nbytes": 2 * nbytes + dense.nbytes,
        "flops": 3 * flops,
        "expected": in_float32(exact.with_gradients()),
    }
    return {name: (forward, options), f"{name} + backward": (both, options_of_both)}


def _bcoo(num_rows, rows, cols, values, dense):
    shape = (dense.shape[0], num_rows, dense.shape[1])
    matrix = sparse.BCOO((values, jnp.stack([rows, cols], axis=-1)), shape=shape)
    return sparse.bcoo_dot_general(matrix, dense, dimension_numbers=(((2,), (1,)), ((0,), (0,))))


def _scipy(rows, cols, values, dense, num_rows):
    """CSR @ dense; and with the gathered products and CSR.T @ result, its gradients."""
    values, dense = np.asarray(values), np.asarray(dense)
    shape = (num_rows, dense.shape[1])
    entries = [
        scipy.sparse.csr_matrix((value, (row, col)), shape=shape)
        for row, col, value in zip(rows, cols, values, strict=True)
    ]

    def forward(*dense):
        return [matrix @ x for matrix, x in zip(entries, dense, strict=True)]

    def both(*dense):
        out = forward(*dense)
        of_values = [
            np.einsum("nd,nd->n", y[row], x[col])
            for row, col, x, y in zip(rows, cols, dense, out, strict=True)
        ]
        return out, (of_values, [matrix.T @ y for matrix, y in zip(entries, out, strict=True)])

    dense = tuple(dense)
    return Contender(forward, dense, on_host=True), Contender(both, dense, on_host=True)


if __name__ == "__main__":
    report.main(products=cases)
