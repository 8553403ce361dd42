"""What the tests of the laws share: drawn arrays, a mesh of host devices, a look into programs."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType

from hyperlayer_jax import IndexTuples
from hyperlayer_jax.kernels.primitives import EVALUATE

NUM_DEVICES = 8
FLOATS = (jnp.float32, jnp.bfloat16)

# Calls a module, compiled.
call = nnx.jit(lambda module, *arguments: module(*arguments))


def floats(low, high, shape, dtype=jnp.float32):
    """Draws arrays of `shape` with entries in [low, high] that `dtype` holds."""
    low, high = float(np.float32(low)), float(np.float32(high))
    elements = st.floats(low, high, width=32, allow_subnormal=False)
    return hnp.arrays(np.float32, shape, elements=elements, fill=st.nothing()).map(
        lambda a: jnp.asarray(a, dtype)
    )


def integers(low, high, shape):
    """Draws int32 arrays of `shape` with entries in [low, high]."""
    elements = st.integers(low, high)
    return hnp.arrays(np.int32, shape, elements=elements, fill=st.nothing()).map(jnp.asarray)


def masks(shape):
    """Draws bool arrays of `shape`."""
    return hnp.arrays(np.bool_, shape, fill=st.nothing()).map(jnp.asarray)


def index_tuples(batch, k, r, *, high=9, dtype=jnp.float32, sigmas=(0.25, 8.0)):
    """Draws tuples of ordinary size, with means in [0, high]."""
    return st.builds(
        IndexTuples,
        means=floats(0, high, (*batch, k, r), dtype),
        sigmas=floats(*sigmas, (*batch, k, r), dtype),
        values=floats(-4, 4, (*batch, k), dtype),
    )


def random_tuples(batch, k, r, *, high=9.0, dtype=jnp.float32, seed=0):
    """One example of tuples of ordinary size, with means in [0, high]."""
    rng = np.random.default_rng(seed)
    return IndexTuples(
        jnp.asarray(rng.uniform(0, high, (*batch, k, r)), dtype),
        jnp.asarray(rng.uniform(0.5, 3, (*batch, k, r)), dtype),
        jnp.asarray(rng.normal(size=(*batch, k)), dtype),
    )


def assert_close(actual, expected, rtol=1e-5, atol=1e-5):
    """Compares two arrays, or two pytrees of arrays of the same shapes, in float64."""

    def compare(a, e):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert a.shape == e.shape
        np.testing.assert_allclose(a, e, rtol, atol)

    if isinstance(actual, jax.Array):
        compare(actual, expected)
    else:
        jax.tree.map(compare, actual, expected)


def assert_equal(actual, expected):
    """Wants two pytrees of arrays to be the same, number by number."""
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_finite(tree):
    """Wants no NaN and no Inf in a pytree of arrays."""
    for leaf in jax.tree.leaves(tree):
        assert np.isfinite(np.asarray(leaf, np.float64)).all()


def batch_mesh(size=NUM_DEVICES):
    """Devices in a row, the axis named "data": those of a host, or as many others, if they are."""
    devices = jax.devices()[:size]
    if len(devices) < size:
        assert jax.default_backend() != "cpu"
        pytest.skip(f"needs {size} devices, of a host or others")
    return jax.make_mesh((size,), ("data",), (AxisType.Auto,), devices=devices)


def equations(jaxpr):
    """Every equation of a jaxpr, those of inner jaxprs and of the library's primitives included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in nested(equation):
            yield from equations(inner)


def nested(equation, platform="cpu"):
    """The jaxprs in an equation; of a primitive of the library, what it is on a platform."""
    if equation.primitive in EVALUATE:
        evaluate = functools.partial(
            EVALUATE[equation.primitive], platform=platform, partitioned=False, **equation.params
        )
        operands = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars]
        yield jax.make_jaxpr(evaluate)(*operands).jaxpr
    for leaf in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns")):
        inner = getattr(leaf, "jaxpr", leaf)
        if hasattr(inner, "eqns"):
            yield inner


def program(function, *args):
    """The equations that `function` becomes for `args`, arrays or `jax.ShapeDtypeStruct`s."""
    return list(equations(jax.make_jaxpr(function)(*args).jaxpr))


def largest_array(function, *args):
    """The number of entries of the largest array that `function` makes on its way."""
    sizes = [
        math.prod(v.aval.shape) for equation in program(function, *args) for v in equation.outvars
    ]
    assert sizes
    return max(sizes)


def operations(function, *args):
    """The names of the primitives that `function` uses."""
    return {equation.primitive.name for equation in program(function, *args)}
