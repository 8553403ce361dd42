"""What the contract of every backend does not ask of the Triton kernels."""

import jax
import jax.numpy as jnp
import pytest

from hyperlayer_jax import kernels


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
