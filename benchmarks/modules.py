"""Whole attention layers, from tokens to tokens: projections, position network, attention.

Learned layers have 32 points for each token and head, block layers as many for each block of 64
tokens, and content layers find 16 keys for each token and head, beside a window of 16. Kernels are
those that a layer chooses by itself. On a GPU, dense layers and windows take cudnn, as a user's
would; and the errors are those of layers in bfloat16 from the same in float32.
"""

import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import report
from benchmarks.accuracy import in_float32
from benchmarks.attention import WIDTH, heads_and_dtype, overtaking
from benchmarks.contenders import Contender, with_gradients
from benchmarks.timing import compare_all
from hyperlayer_jax.nn import SparseSelfAttention

_LENGTHS = {
    "cpu": tuple(2**n for n in range(10, 15)),
    "gpu": (2**14, 2**16, 2**13),
    "tpu": (2**13, 2**14),
}
_SMALL = 128
# A dense layer in plain XLA holds [heads,t,t].
_MAX_PLAIN_LENGTH = 2**13


def cases(small: bool = False) -> Iterator[dict[str, Any] | str]:
    """Layers of every kind at all lengths, then what a token costs in each of ours."""
    figures = {}
    for item in overtaking(_cases(small)):
        yield item
        if isinstance(item, dict) and item["ms"] is not None:
            name, length = item["name"].split(" t=")
            figures.setdefault(name, {})[int(length)] = item
    for name, by_length in figures.items():
        us = {t: 1e3 * case["ms"] / t for t, case in by_length.items()}
        kb = {t: 1e3 * case["temporary_mb"] / t for t, case in by_length.items()}
        for unit, each in (("us", us), ("kB", kb)):
            costs = ", ".join(f"{x:.3g} at {t}" for t, x in each.items())
            spread = max(each.values()) / min(each.values())
            yield f"{name}: {unit} per token {costs} (within {spread:.2f}x)"


def _cases(small):
    on_cpu = jax.default_backend() == "cpu"
    heads, dtype = (1, jnp.bfloat16) if small and on_cpu else heads_and_dtype()
    for checked, way, kinds_at in _rounds(small, on_cpu):
        cases = {}
        for length, (ours, *rivals) in kinds_at.items():
            layers = {
                f"{kind} module": _layer(kind, heads, length, dtype, same=kind == ours)
                for kind in (ours, *rivals)
            }
            exact = None
            if checked and length <= _MAX_PLAIN_LENGTH:
                exact = in_float32(_layer(ours, heads, length, jnp.float32).with_gradients())
            layers = layers if way == "forward" else with_gradients(layers)
            cases[f"{ours} module {way} t={length}"] = layers, {"expected": exact}
        yield from compare_all(cases)


def _rounds(small, on_cpu):
    """Yields whether results are checked, a way, and kinds of layers by length, ours first.

    Rounds of a GPU are compiled as a whole, what users ask for first: search for the best products
    may take a minute. On a CPU there is one rival at a time: gigabytes that a dense layer has just
    given back slow down its peers.
    """
    both, lengths = "forward + backward", _LENGTHS[jax.default_backend()]
    if small:
        yield True, both, {_SMALL: ("block", "dense")}
    elif not on_cpu:
        every = "block", "learned", "content", "window", "dense"
        for length in lengths:
            yield False, both, {length: ("block", "window", "dense")}
        for length in lengths:
            yield True, both, {length: ("block", "learned", "content")}
        yield False, "forward", dict.fromkeys(lengths, every)
    else:
        for length in lengths:
            yield True, both, {length: ("learned", "window")}
            if length > _MAX_PLAIN_LENGTH:
                yield True, both, {length: ("content", "window")}
                continue
            for ours in ("learned", "block", "content"):
                yield True, both, {length: (ours, "dense")}


def _layer(kind, heads, length, dtype, same=True):
    features = heads * WIDTH
    layer = SparseSelfAttention(
        features, heads, length, pattern=kind, dtype=dtype, rngs=nnx.Rngs(0)
    )
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    def run(params, rest, x):
        with _cudnn(wanted=dtype == jnp.bfloat16):
            return nnx.merge(graphdef, params, rest, copy=True)(x)

    x = jax.random.normal(jax.random.key(0), (1, length, features)).astype(dtype)
    return Contender(run, (params, rest, x), (0, 2), same=same)


def _cudnn(*, wanted):
    """While a layer is traced on a GPU, its dense attention is that of cudnn."""
    implementation = "cudnn" if wanted and jax.default_backend() == "gpu" else None
    attend = functools.partial(jax.nn.dot_product_attention, implementation=implementation)
    return mock.patch.object(jax.nn, "dot_product_attention", attend)


if __name__ == "__main__":
    report.main(modules=cases)
