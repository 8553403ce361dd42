"""Measures block sizes of the Triton kernels: `python -m benchmarks.tune` writes kernels/tuned.py.

For each kernel and class of shapes it walks through the fields of a `Config` one at a time, and
keeps the fastest. Other devices keep their rows. On a CPU, where the kernels are interpreted, it
only tries itself out, on a few tiny arrays, and wants `--out` elsewhere.
"""

import itertools
import pathlib
import pprint
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.timing import interleave, value_and_gradients
from hyperlayer_jax import kernels
from hyperlayer_jax.kernels import tuned, tuning

_OPTIONS = {
    "tile": (512, 1024, 2048, 4096, 8192),
    "entries": (4, 16, 64),
    "features": (32, 128, 256),
    "warps": (1, 2, 4, 8),
    "stages": (1, 2, 3),
}
_FEATURES = (1, 16, 64, 256)
_TABLE = pathlib.Path(tuned.__file__)
_OUT = flags.DEFINE_string("out", str(_TABLE), "The Python file to write.")


def cases(num_rows: int) -> Iterator[tuple[tuple[str, int, int], Callable, tuple]]:
    """Yields a key of the table, a function that runs its kernel, and the arguments.

    Args:
      num_rows: rows of every operand.
    """
    rng = np.random.default_rng(0)
    n = num_rows

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    def positions(*shape):
        return jnp.asarray(rng.integers(0, n, shape), jnp.int32)

    def key(kernel, entries, features):
        return kernel, *tuning.shape_class(entries, features)

    def ell_spmm(indices, values, dense):
        return kernels.ell_spmm(indices, values, dense, implementation="triton")

    def spmm(rows, cols, values, dense):
        return kernels.spmm(rows, cols, values, dense, num_rows=n, implementation="triton")

    def sddmm(rows, cols, lhs, rhs):
        return kernels.sddmm(rows, cols, lhs, rhs, implementation="triton")

    def attention(q, k, v, indices, log_weights):
        return kernels.gathered_attention(q, k, v, indices, log_weights, implementation="triton")

    def redistribute(points, means, sigmas, values, where):
        return kernels.redistribute(points, means, sigmas, values, where, implementation="triton")

    for d in _FEATURES:
        for p in (1, 4, 16, 64):
            yield key("sum_rows", p, d), ell_spmm, (positions(n, p), normal(n, p), normal(n, d))
        entries = positions(8 * n), positions(8 * n)
        yield key("scatter", 1, d), spmm, (*entries, normal(8 * n), normal(n, d))
        yield key("dots", 1, d), sddmm, (*entries, normal(n, d), normal(n, d))
        for p in (16, 64):
            qkv = normal(n, d), normal(n, d), normal(n, d)
            arguments = *qkv, positions(n, p), normal(n, p)
            run = value_and_gradients(attention, 0, 1, 2, 4)
            yield key("gathered_attention", p, d), run, arguments
    for m, k in ((16, 4), (64, 4), (64, 16), (256, 64), (4096, 1024)):
        chunks = max(1, 8 * n // m)
        arguments = (
            positions(chunks, m, 2),
            n * jnp.abs(normal(chunks, k, 2)),
            1 + jnp.abs(normal(chunks, k, 2)),
            normal(chunks, k),
            jnp.ones((chunks, m), bool),
        )
        run = value_and_gradients(redistribute, 1, 2, 3)
        yield key("redistribute", m, k), run, arguments


def fastest(
    table: dict, key: tuple[str, int, int], function: Callable, arguments: tuple
) -> tuple[tuning.Config, float]:
    """The best `Config` for a key of `table`, and its seconds; the last one tried stays in it."""

    def prepare(config):
        table[key] = tuple(config)
        jax.clear_caches()
        compiled = jax.jit(function).lower(*arguments).compile()
        return lambda _: compiled(*arguments)

    best, seconds = tuning.RULE, {}
    for field, options in _OPTIONS.items():
        seconds = interleave(
            {config: prepare(config) for config in (best._replace(**{field: o}) for o in options)}
        )
        best = min(seconds, key=seconds.get)
    return best, seconds[best]


def main(_):
    on_cpu = jax.default_backend() == "cpu"
    out = pathlib.Path(_OUT.value)
    if on_cpu and out == _TABLE:
        raise app.UsageError("out: got the table of the package, want another file on a CPU")
    table = tuned.TABLE.setdefault(jax.devices()[0].device_kind, {})
    chosen = itertools.islice(cases(4), 2) if on_cpu else cases(2**16)
    for key, function, arguments in chosen:
        config, seconds = fastest(table, key, function, arguments)
        table[key] = tuple(config)
        print(f"{key!s:36} {1e3 * seconds:9.3f} ms  {config}", flush=True)
    body = pprint.pformat(tuned.TABLE, width=100)
    out.write_text(f'"""{tuned.__doc__}"""\n\nTABLE = {body}\n')


if __name__ == "__main__":
    app.run(main)
