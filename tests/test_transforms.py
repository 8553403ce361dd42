"""Laws of the transformations of raw outputs: bounded means and positive sigmas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads
from laws import FLOATS, assert_close, assert_finite, floats

import hyperlayer_jax as hl

HUGE = float(np.finfo(np.float32).max) / 2
SPACES = ((1,), (7, 1), (10**6, 2, 300), (2**31 - 1,), (2**24 + 3, 9))
means_of = jax.jit(hl.transform_means, static_argnames=("shape", "method"))


@functools.partial(jax.jit, static_argnames=("shape", "method"))
def means_and_gradient(raw, shape, method):
    means, vjp = jax.vjp(lambda raw: hl.transform_means(raw, shape, method=method), raw)
    return means, vjp(jnp.ones_like(means))


@functools.partial(jax.jit, static_argnames=("shape", "minimum"))
def sigmas_and_gradient(raw, shape, minimum):
    to_sigmas = lambda raw: hl.transform_sigmas(raw, shape, scale=0.25, minimum=minimum)  # noqa: E731
    sigmas, vjp = jax.vjp(to_sigmas, raw)
    return sigmas, vjp(jnp.ones_like(sigmas))


@st.composite
def raw_means(draw, low=-HUGE, high=HUGE):
    shape = draw(st.sampled_from(SPACES))
    dtype = draw(st.sampled_from(FLOATS))
    return draw(floats(low, high, (2, 3, len(shape)), dtype)), shape


@pytest.mark.parametrize("method", ["sigmoid", "clip"])
@given(case=raw_means())
def test_means_lie_in_the_index_space(method, case):
    raw, shape = case
    means, gradient = means_and_gradient(raw, shape, method)
    assert means.shape == raw.shape and means.dtype == raw.dtype
    exact = np.asarray(means, np.float64)
    assert (exact >= 0).all() and (exact <= np.array(shape) - 1.0).all()
    assert_finite(gradient)


@pytest.mark.parametrize("method", ["sigmoid", "clip"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_means_reach_both_ends(method, dtype):
    shape = (1, 7, 100)
    raw = jnp.broadcast_to(jnp.array([[-1e30], [1e30]], dtype), (2, 3))
    assert_close(means_of(raw, shape, method=method), [[0, 0, 0], [0, 6, 99]], 0, 0)


@pytest.mark.parametrize("method", ["sigmoid", "clip"])
def test_means_grow_with_raw(method):
    raw = jnp.linspace(-20, 20, 401)[:, None]
    means = np.asarray(means_of(raw, (9,), method=method))[:, 0]
    assert (np.diff(means) >= 0).all() and means[0] < 1e-6 and means[-1] == 8


def test_clipping_leaves_indices_alone():
    raw = jnp.linspace(0, 8, 33)[:, None]
    assert_close(means_of(raw, (9,), method="clip"), raw, 0, 0)


def test_a_raw_zero_is_the_middle():
    assert_close(means_of(jnp.zeros((1, 3)), (1, 4, 9)), [[0, 1.5, 4]])


@given(case=raw_means(-1e25, 1e25), minimum=st.sampled_from([0.0, 0.05]))
def test_sigmas_are_positive_and_in_proportion_to_the_axes(case, minimum):
    raw, shape = case
    raw = raw[..., 0]
    sigmas, gradient = sigmas_and_gradient(raw, shape, minimum)
    assert sigmas.shape == (*raw.shape, len(shape)) and sigmas.dtype == raw.dtype
    assert_finite((sigmas, gradient))
    exact = np.asarray(sigmas, np.float64)
    assert (exact > 0).all()
    unit = np.logaddexp(np.asarray(raw, np.float64), 0)[..., None]
    expected = unit * 0.25 * np.array(shape) + minimum
    tolerance = 2e-6 if raw.dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(exact, expected, tolerance, 1e-30)


def test_gradients_match_finite_differences():
    with jax.enable_x64(True):
        raw = jnp.linspace(-3, 3, 12).reshape(2, 3, 2)
        check_grads(lambda raw: hl.transform_means(raw, (5, 90)), (raw,), 1, ["rev"])
        check_grads(lambda raw: hl.transform_sigmas(raw, (5, 90)), (raw,), 1, ["rev"])


RAW = jnp.zeros((2, 3, 2))
ERRORS = {
    "raw: got int32": lambda: hl.transform_means(RAW.astype(jnp.int32), (3, 3)),
    r"raw: got shape \(2,\)": lambda: hl.transform_means(RAW[:, 0, 0], (3,)),
    r"shape: got \(3,\), want 2 axes": lambda: hl.transform_means(RAW, (3,)),
    r"shape: got \(3, 0\)": lambda: hl.transform_means(RAW, (3, 0)),
    r"shape: got \(2.5, 3\), want a sequence of ints": lambda: hl.transform_means(RAW, (2.5, 3)),
    r"shape: got \(2147483648, 3\)": lambda: hl.transform_means(RAW, (2**31, 3)),
    "shape: got 3, want a sequence": lambda: hl.transform_means(RAW, 3),
    'method: got \'tanh\', want "sigmoid" or "clip"': lambda: hl.transform_means(
        RAW, (3, 3), method="tanh"
    ),
    "raw: got bool, want a floating array": lambda: hl.transform_sigmas(RAW > 0, (3,)),
    r"raw: got shape \(\)": lambda: hl.transform_sigmas(RAW[0, 0, 0], (3,)),
    r"shape: got \(\)": lambda: hl.transform_sigmas(RAW, ()),
    "scale: got 0.0, want > 0": lambda: hl.transform_sigmas(RAW, (3,), scale=0.0),
    "scale: got nan": lambda: hl.transform_sigmas(RAW, (3,), scale=float("nan")),
    "minimum: got -1.0, want >= 0": lambda: hl.transform_sigmas(RAW, (3,), minimum=-1.0),
}


@pytest.mark.parametrize("message", ERRORS)
def test_wrong_input_names_the_argument(message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(ERRORS[message])
