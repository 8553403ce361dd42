"""What depends on no argument of a program is computed by its compiler: for minutes, where it grows
with a sequence."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend.core import Literal
from laws import nested

from hyperlayer_jax import soft_quicksort
from hyperlayer_jax.nn import SparseLinear, SparseSelfAttention

LENGTH = 192
# What XLA takes far longer to compute than a device does.
SLOW = ("cum", "sort", "reduce_window", "scatter", "top_k", "gather")


def left_to_the_compiler(jaxpr, given):
    """Yields what is slow in a jaxpr, on as many numbers as LENGTH, and depends on no argument.

    `given` says which of the inputs of this jaxpr do.
    """
    known = {v for v, depends in zip(jaxpr.invars, given, strict=True) if depends}
    for equation in jaxpr.eqns:
        name, loops = equation.primitive.name, equation.primitive.name in ("scan", "while")
        inputs = [not isinstance(v, Literal) and v in known for v in equation.invars]
        if any(inputs):
            known.update(equation.outvars)
        elif name.startswith(SLOW) and equation.invars[0].aval.size >= LENGTH:
            yield str(equation)
        for inner in nested(equation, platform="cuda"):
            same = len(inner.invars) == len(inputs) and not loops
            given = inputs if same else [loops or any(inputs)] * len(inner.invars)
            yield from left_to_the_compiler(inner, given)


def check(function, *arguments):
    """Of the value and all gradients."""

    def loss(arguments):
        return sum((leaf.astype(jnp.float32) ** 2).sum() for leaf in function(*arguments))

    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss, allow_int=True))(arguments).jaxpr
    assert not list(left_to_the_compiler(jaxpr, [True] * len(jaxpr.invars)))


def check_layer(layer, x):
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    check(lambda params, x: [nnx.merge(graphdef, params, rest, copy=True)(x)], params, x)


@pytest.mark.parametrize("pattern", ["block", "learned", "learned2d", "content", "window"])
def test_attention(pattern):
    layer = SparseSelfAttention(16, 2, LENGTH, pattern=pattern, rngs=nnx.Rngs(0))
    check_layer(layer, jnp.ones((1, LENGTH, 16)))


def test_sparse_layers():
    layer = SparseLinear(LENGTH, LENGTH, 4, by_output=True, rngs=nnx.Rngs(0))
    check_layer(layer, jnp.ones((2, LENGTH)))


def test_sorts():
    def sort(x):
        key = jax.random.key(0)
        return soft_quicksort(key, x, x[..., 0], num_samples=2, certainty=1.0).items[-1:]

    check(sort, jnp.ones((1, LENGTH, 3)))
