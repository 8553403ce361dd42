"""Convolution with learned taps is a convolution, and finds the taps of another one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from laws import assert_close, call, largest_array

import hyperlayer_jax as hl
from hyperlayer_jax import nn

CASES = {
    "delays": ((9,), (4,), {}),
    "strides": ((6, 7), (3, 2), {"strides": (2, 3), "padding": "VALID"}),
    "dilation and groups": ((6, 5), (2, 3), {"dilation": (2, 1), "groups": 2}),
    "volumes": ((3, 4, 5), (2, 2, 3), {"strides": 2, "dilation": 2}),
}


def dense_kernel(layer):
    """[*field, in_features / groups, out_features]."""
    return jnp.moveaxis(hl.todense(layer.weight()), (0, 1), (-1, -2))


@pytest.mark.parametrize("case", CASES)
def test_it_is_a_convolution(case):
    image, field, options = CASES[case]
    layer = nn.SparseConv(4, 6, 3, field, rngs=nnx.Rngs(0), **options)
    layer.bias[...] = jnp.arange(6.0)
    x = jax.random.normal(jax.random.key(0), (2, *image, 4))
    rank = len(field)
    letters = "XYZ"[:rank]
    want = jax.lax.conv_general_dilated(
        x,
        dense_kernel(layer),
        layer.strides,
        layer.padding,
        rhs_dilation=layer.dilation,
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        feature_group_count=layer.groups,
    )
    y = call(layer, x)
    assert_close(y, np.asarray(want) + np.arange(6.0))
    assert_close(call(layer, x[0]), y[0])


def test_it_finds_the_taps_of_another_one():
    """Three delays out of 200, exactly; the field is looked at a few places at a time."""
    steps, batch = 500, 4
    make = functools.partial(nn.SparseConv, 1, 1, 3, (200,), padding="VALID", use_bias=False)
    teacher, model = make(rngs=nnx.Rngs(1)), make(rngs=nnx.Rngs(0))
    teacher.tuples.values[...] = jnp.array([[1.0, -0.7, 0.5]])
    teacher = nnx.view(teacher, deterministic=True)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, steps))
    optimizer = nn.jumps(jax.random.key(0), model, optimizer, until=450, every=4, fraction=1.0)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def step(carry, key):
        params, state = carry
        x = jax.random.normal(key, (batch, 264, 1))

        def loss(params):
            return ((nnx.merge(graphdef, params, rest, copy=True)(x) - teacher(x)) ** 2).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    with jax.numpy_dtype_promotion("standard"):
        carry = (params, optimizer.init(params))
        keys = jax.random.split(jax.random.key(1), steps)
        (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))(carry)
    assert_close(dense_kernel(nnx.merge(graphdef, params, rest)), dense_kernel(teacher), 0.01, 0.01)


def test_no_kernel_of_the_size_of_the_field_is_formed():
    layer = nn.SparseConv(1, 2, 3, (2000, 2000), dilation=1, rngs=nnx.Rngs(0))
    gradient = jax.grad(lambda layer, x: (layer(x) ** 2).sum(), allow_int=True)
    assert largest_array(gradient, layer, jnp.ones((1, 5, 5, 1))) < 10_000


ERRORS = {
    r"field: got \(0,\)": lambda: nn.SparseConv(1, 1, 1, (0,), rngs=nnx.Rngs(0)),
    "padding: got 'CAUSAL'": lambda: nn.SparseConv(
        1, 1, 1, (3,), padding="CAUSAL", rngs=nnx.Rngs(0)
    ),
    "groups: got 2": lambda: nn.SparseConv(3, 2, 1, (3,), groups=2, rngs=nnx.Rngs(0)),
    "num_tuples: got 0, want": lambda: nn.SparseConv(1, 1, 0, (3,), rngs=nnx.Rngs(0)),
    "num_tuples: got 4, want at most 3": lambda: nn.SparseConv(1, 1, 4, (3,), rngs=nnx.Rngs(0)),
    r"strides: got \(1, 1\)": lambda: nn.SparseConv(
        1, 1, 1, (3,), strides=(1, 1), rngs=nnx.Rngs(0)
    ),
    "x: got 2 channels, want 1": lambda: nn.SparseConv(1, 1, 1, (3,), rngs=nnx.Rngs(0))(
        jnp.zeros((4, 2))
    ),
    r"x: got an image of \(2,\)": lambda: nn.SparseConv(
        1, 1, 1, (3,), padding="VALID", rngs=nnx.Rngs(0)
    )(jnp.zeros((2, 1))),
}


@pytest.mark.parametrize("message", ERRORS)
def test_wrong_input_is_an_error_that_names_the_argument(message):
    with pytest.raises(ValueError, match=message):
        ERRORS[message]()
