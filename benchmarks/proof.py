"""Every backend at real sizes, where a race or an overflow would show, against float32.

4096 queries or rows, each with 16 entries; every one has the first block, key or column besides
what it draws, so that all programs of a kernel meet there. Eleven runs have to give the same bits.
"""

import functools
import importlib.metadata
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import attention, report
from benchmarks.accuracy import agreement, agrees, in_float32
from benchmarks.contenders import Contender, by_name, with_gradients
from benchmarks.timing import begin, prepare
from hyperlayer_jax import kernels

_ROWS, _ENTRIES, _WIDTH = 4096, 16, 64
_SMALL_ROWS = 256


def smoke(small: bool = False) -> Iterator[dict[str, Any] | str]:
    """The device and a product on it. At full scale jax has to find an accelerator."""
    device = jax.devices()[0]
    x = jnp.ones((256, 256))
    yield {
        "name": f"{device.device_kind} ({device.platform})",
        "ok": bool((jax.jit(jnp.matmul)(x, x) == 256).all())
        and (small or device.platform != "cpu"),
        "memory_mb": (device.memory_stats() or {}).get("bytes_limit", 0) / 1e6,
        "platform": device.client.platform_version,
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
    }


def real(small: bool = False) -> Iterator[dict[str, Any] | str]:
    """Value and gradients of every operation by every backend."""
    rows = _SMALL_ROWS if small else _ROWS
    for name, (every, exact) in _problems(rows):
        begin()
        expected = jax.block_until_ready(in_float32(exact.with_gradients())())
        for label, prepared in prepare(with_gradients(every)).items():
            yield _row(f"{name} {label}", every[label], expected, prepared)


def _row(name, contender, expected, prepared):
    try:
        if isinstance(prepared, Exception):
            raise prepared
        run, spent, _ = prepared
        result = jax.block_until_ready(run(0))
    except NotImplementedError as error:
        return {"name": name, "ok": True, "lacks": str(error)[:200]}
    except Exception as error:  # The next one may do better.
        return {"name": name, "ok": False, "error": f"{type(error).__name__}: {error}"[:300]}
    figures = agreement(run, result, expected)
    dtype = jax.tree.leaves(result)[0].dtype.name
    ok = agrees(figures, dtype, contender.implementation)
    return {"name": name, "ok": ok, "dtype": dtype, **figures, **spent}


def _problems(rows):
    """Yields a name, contenders, and what gives the result that is expected of all."""
    heads = 2 if rows == _SMALL_ROWS else 8
    for name in ("block", "gathered"):
        arguments = attention.operands(name, heads, rows, jnp.bfloat16, entries=_ENTRIES, hot=True)
        every = attention.contenders(name, arguments)
        yield f"{name}_attention", (every, every.pop("gather + einsum"))
    for name, function, plain, arguments in _products(rows):
        gradients = (len(arguments) - 2, len(arguments) - 1)
        exact = Contender(plain, arguments, gradients)
        yield name, (by_name(name, function, arguments, gradients), exact)
    yield "redistribute", _redistribute(rows)


def _products(rows):
    """Yields a name, the operation, the same as gather and scatter, and its arguments."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    @jax.vmap
    def spmm(rows, cols, values, dense):
        return jnp.zeros_like(dense).at[rows].add(values[:, None] * dense[cols])

    @jax.vmap
    def sddmm(rows, cols, lhs, rhs):
        return (lhs[rows] * rhs[cols]).sum(-1)

    drawn = rng.integers(0, rows, (2, rows, _ENTRIES), np.int32)
    drawn[..., 0] = 0
    ell = jnp.asarray(drawn)
    own = jnp.broadcast_to(jnp.arange(rows)[:, None], ell.shape).reshape(2, -1)
    cols = ell.reshape(2, -1)
    values, left, right = normal(*ell.shape), normal(2, rows, _WIDTH), normal(2, rows, _WIDTH)

    def ell_spmm(ell, values, dense):
        return spmm(own, cols, values.reshape(2, -1), dense)

    def ell_spmm_transposed(ell, values, dense):
        return spmm(cols, own, values.reshape(2, -1), dense)

    def ell_sddmm(ell, lhs, rhs):
        return sddmm(own, cols, lhs, rhs).reshape(ell.shape)

    transposed = functools.partial(kernels.ell_spmm_transposed, num_cols=rows)
    by_entry = functools.partial(kernels.spmm, num_rows=rows)
    yield "ell_spmm", kernels.ell_spmm, ell_spmm, (ell, values, right)
    yield "ell_spmm_transposed", transposed, ell_spmm_transposed, (ell, values, left)
    yield "ell_sddmm", kernels.ell_sddmm, ell_sddmm, (ell, left, right)
    yield "spmm", by_entry, spmm, (own, cols, values.reshape(2, -1), right)
    yield "sddmm", kernels.sddmm, sddmm, (own, cols, left, right)


def _redistribute(rows):
    chunks, tuples, points = 16, 64, rows
    keys = jax.random.split(jax.random.key(0), 3)
    rng = np.random.default_rng(0)
    # No point twice: of two, the operation may take one.
    places = np.stack([rng.choice(1000**2, points, replace=False) for _ in range(chunks)])
    arguments = (
        jnp.asarray(np.stack([places // 1000, places % 1000], axis=-1), jnp.int32),
        jax.random.uniform(keys[0], (chunks, tuples, 2), maxval=1000),
        20 + 30 * jax.random.uniform(keys[1], (chunks, tuples, 2)),
        jax.random.normal(keys[2], (chunks, tuples)),
        jnp.broadcast_to(jnp.arange(points) % 7 != 0, (chunks, points)),
    )

    def plain(points, means, sigmas, values, where):
        offsets = (points[:, None].astype(means.dtype) - means[:, :, None]) / sigmas[:, :, None]
        logits = jnp.where(where[:, None], -(offsets**2).sum(-1) / 2, -jnp.inf)
        return jnp.einsum("bk,bkm->bm", values, jax.nn.softmax(logits, axis=-1))

    def ours(points, means, sigmas, values, where, implementation=None):
        return kernels.redistribute(
            points, means, sigmas, values, where=where, implementation=implementation
        )

    every = by_name("redistribute", ours, arguments, (1, 2, 3))
    return every, Contender(plain, arguments, (1, 2, 3))


if __name__ == "__main__":
    report.main(smoke=smoke, real=real)
