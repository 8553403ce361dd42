"""What the contract of every backend does not ask of the Triton kernels; interpreted on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperlayer_jax import kernels
from hyperlayer_jax.kernels import tuned, tuning

BACKENDS = ("triton", "triton_deterministic")


def normal(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_all_entries_in_one_row_add_up(implementation):
    """The interpreter adds them one by one: that atomics lose none, a device must show, here."""
    n, d = 1000, 5
    rows, cols, values, dense = jnp.zeros(n, jnp.int32), jnp.arange(n), normal(n), normal(n, d)
    out = kernels.spmm(rows, cols, values, dense, num_rows=3, implementation=implementation)
    np.testing.assert_allclose(out[0], values @ dense, 1e-4, 1e-4)
    np.testing.assert_array_equal(out[1:], 0)


def test_deterministic_gradients_are_the_same_bits_twice():
    indices = jnp.asarray(np.random.default_rng(0).integers(0, 3, (40, 7)), jnp.int32)
    floats = normal(40, 9), normal(3, 9), normal(3, 8), normal(40, 7)

    def gradients(implementation):
        def loss(q, k, v, log_weights):
            return (
                kernels.gathered_attention(
                    q, k, v, indices, log_weights, implementation=implementation
                )
                ** 2
            ).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2, 3)))

    run = gradients("triton_deterministic")
    for first, second, wanted in zip(
        run(*floats), run(*floats), gradients("xla")(*floats), strict=True
    ):
        np.testing.assert_array_equal(first, second)
        np.testing.assert_allclose(first, wanted, 1e-4, 1e-4)


@pytest.mark.parametrize("sigma", [0.0, 1e-3, 1e30])
def test_redistribute_conserves_far_from_every_point(sigma):
    points = jnp.asarray(np.random.default_rng(0).integers(0, 9, (40, 2)), jnp.int32)
    means, values = normal(3, 2) * jnp.array([[1, 1e9]]), normal(3)

    def function(means, sigmas, values):
        where = jnp.ones(40, bool)
        return kernels.redistribute(points, means, sigmas, values, where, implementation="triton")

    out, vjp = jax.vjp(function, means, jnp.full_like(means, sigma), values)
    np.testing.assert_allclose(out.sum(), values.sum(), 1e-5, 1e-5)
    assert all(jnp.isfinite(gradient).all() for gradient in vjp(out))


def test_says_what_it_lacks():
    def attend(d, p=1, dtype=jnp.float32):
        x = jax.ShapeDtypeStruct((2, d), dtype)
        entries = [jax.ShapeDtypeStruct((2, p), t) for t in (jnp.int32, dtype)]
        function = lambda *a: kernels.gathered_attention(*a, implementation="triton")  # noqa: E731
        jax.eval_shape(function, x, x, x, *entries)

    attend(256)
    with pytest.raises(NotImplementedError, match="at most 256 features of a head, got 257"):
        attend(257)
    with pytest.raises(NotImplementedError, match="numbers at most 2147483647 entries"):
        attend(1, p=2**30)
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="float32, got float64"):
        attend(1, dtype=jnp.float64)


def test_measured_block_sizes_go_before_the_rule(monkeypatch):
    measured = tuning.Config(tile=1024, entries=4, features=32, warps=2, stages=1)
    key = ("sum_rows", *tuning.shape_class(10, 60))
    monkeypatch.setattr(tuned, "TABLE", {jax.devices()[0].device_kind: {key: measured}})
    assert tuning.choose("sum_rows", 16, 64) == measured
    assert tuning.choose("sum_rows", 17, 64) == tuning.RULE
    assert tuning.choose("dots", 16, 64) == tuning.RULE
