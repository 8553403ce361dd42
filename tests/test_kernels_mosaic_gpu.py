"""Laws of block attention on Mosaic GPU, interpreted, against the float64 oracle and plain JAX.

Interpreted copies arrive at once and products end where they begin: what is proven here is the
arithmetic, not the order of asynchronous steps, which only a device can test.
"""

import contextlib

import jax
import jax.numpy as jnp
import kernels_oracle as oracle
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from hyperlayer_jax import kernels

CASES = {
    "one tile to a block": ((2,), 64, 64, 64, 3, False),
    "causal": ((2,), 64, 64, 128, 2, True),
    "four tiles to a block": ((), 128, 128, 64, 2, True),
    "one entry": ((1, 1), 64, 64, 64, 1, False),
}


@pytest.fixture
def interpreted():
    """On a CPU; on a GPU the kernels run as they are."""
    if jax.default_backend() != "cpu":
        mode = contextlib.nullcontext()
    elif hasattr(plgpu, "force_gpu_interpret_mode"):
        mode = plgpu.force_gpu_interpret_mode()
    else:
        pytest.skip("this jax has no interpreter of Mosaic GPU kernels")
    with mode:
        yield


interpreted_or_real = pytest.mark.usefixtures("interpreted")


def example(case):
    """(function of the floats, floats, oracle): 2 blocks of queries, 3 of keys, some absent."""
    batch, block, d, e, p, causal = CASES[case]
    rng = np.random.default_rng(0)

    def operand(*shape, scale=1.0):
        return jnp.asarray(scale * rng.standard_normal((*batch, *shape)), jnp.bfloat16)

    indices = jnp.asarray(rng.integers(-1, 4, (*batch, 2, p)), jnp.int32)
    log_weights = jnp.where(rng.random((*batch, 2, p)) < 0.2, -jnp.inf, operand(2, p))
    scale = d**-0.25
    q, k = operand(2 * block, d, scale=scale), operand(3 * block, d, scale=scale)
    floats = q, k, operand(3 * block, e), log_weights

    def function(q, k, v, log_weights, implementation="mosaic_gpu"):
        return kernels.block_attention(
            q,
            k,
            v,
            indices,
            log_weights,
            block=block,
            causal=causal,
            implementation=implementation,
        )

    def expected(q, k, v, log_weights):
        return oracle.block_attention(
            q, k, v, np.asarray(indices), log_weights, block=block, causal=causal
        )

    return function, floats, expected


def assert_close(actual, expected):
    """To the rounding of the weights to bfloat16, which is relative to the largest."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    np.testing.assert_allclose(actual, expected, 2e-2, 2e-2 * np.abs(expected).max())


@interpreted_or_real
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_oracle(case):
    function, floats, expected = example(case)
    assert_close(jax.jit(function)(*floats), expected(*floats))


@pytest.mark.slow
@interpreted_or_real
@pytest.mark.parametrize("case", CASES)
def test_gradients_agree_with_plain_jax(case):
    function, floats, _ = example(case)
    out, vjp = jax.vjp(function, *floats)
    _, plain = jax.vjp(lambda *floats: function(*floats, implementation="reference"), *floats)
    for gradient, wanted in zip(vjp(out), plain(out), strict=True):
        assert gradient.dtype == jnp.bfloat16
        assert_close(gradient, wanted)


@pytest.mark.slow
@interpreted_or_real
def test_gives_the_same_bits_twice():
    function, floats, _ = example("causal")
    run = jax.jit(lambda *floats: jax.vjp(function, *floats)[1](floats[2][..., :128, :]))
    for first, second in zip(run(*floats), run(*floats), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.slow
@interpreted_or_real
def test_vmap_and_grad_commute():
    function, floats, _ = example("one entry")
    floats = tuple(jnp.stack([x, x[..., ::-1]]) for x in floats)
    loss = lambda *floats: (function(*floats).astype(jnp.float32) ** 2).sum()  # noqa: E731
    each = jax.grad(loss, (0, 1, 2, 3))
    mapped = jax.vmap(each)(*floats)
    summed = jax.grad(lambda floats: jax.vmap(loss)(*floats).sum())(floats)
    alone = [each(*(x[n] for x in floats)) for n in range(2)]
    for a, s, *e in zip(mapped, summed, *alone, strict=True):
        np.testing.assert_array_equal(a, jnp.stack(e))
        np.testing.assert_array_equal(s, jnp.stack(e))


@interpreted_or_real
def test_all_masked_is_zero_and_reads_nothing():
    function, (q, k, v, log_weights), _ = example("one tile to a block")
    floats = q, jnp.full_like(k, jnp.nan), jnp.full_like(v, jnp.nan)
    out, vjp = jax.vjp(function, *floats, jnp.full_like(log_weights, -jnp.inf))
    for array in (out, *vjp(jnp.ones_like(out))):
        np.testing.assert_array_equal(array, 0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dtype": jnp.float32}, "it multiplies bfloat16, got float32"),
        ({"block": 32}, "it works in tiles of 64, got blocks of 32"),
        ({"d": 80}, "it serves heads of 64 or 128 features, got 80"),
    ],
)
def test_says_what_it_lacks(changes, message):
    dtype, block, d = ({"dtype": jnp.bfloat16, "block": 64, "d": 64} | changes).values()
    x, log_weights = jnp.zeros((2 * block, d), dtype), jnp.zeros((2, 1), dtype)
    indices = jnp.zeros((2, 1), jnp.int32)
    with pytest.raises(NotImplementedError, match=message):
        kernels.block_attention(
            x, x, x, indices, log_weights, block=block, causal=True, implementation="mosaic_gpu"
        )
