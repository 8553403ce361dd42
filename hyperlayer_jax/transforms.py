"""From raw network outputs to bounded means and positive sigmas."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hyperlayer_jax import checks
from hyperlayer_jax.kernels import materialize


def transform_means(raw: jax.Array, shape: Sequence[int], *, method: str = "sigmoid") -> jax.Array:
    """Maps unbounded numbers into the index space, axis by axis (equation 2 of docs/method.md).

    Args:
      raw: float [*B, k, r], any finite values.
      shape: the r axes of the index space.
      method: "sigmoid" squeezes smoothly, sigmoid(raw) * (s - 1); "clip" takes raw as indices and
        clips them to [0, s - 1], so means beyond an edge get no gradient.

    Returns:
      Means [*B, k, r] in [0, s - 1], of the dtype of `raw`.

    Raises:
      ValueError: `raw` is not floating [*B, k, r], `shape` does not have r axes, or `method` is
        unknown.
    """
    raw = checks.as_arrays(raw)
    checks.check_float("raw", raw, 2, "[*B, k, r]")
    shape = checks.check_shape("shape", shape, raw.shape[-1])
    last = per_axis(last_indices(shape, raw.dtype), raw)
    if method == "sigmoid":
        return materialize(jax.nn.sigmoid(raw)) * last
    if method == "clip":
        return jnp.clip(raw, 0, last)
    raise ValueError(f'method: got {method!r}, want "sigmoid" or "clip"')


def transform_sigmas(
    raw: jax.Array, shape: Sequence[int], *, scale: float = 0.1, minimum: float = 0.0
) -> jax.Array:
    """Maps one unbounded number per tuple to standard deviations, in proportion to each axis.

    softplus(raw) * scale * s + minimum for an axis of length s (equation 3 of docs/method.md): a
    raw 0 is about 0.07 of the axis at the default scale.

    Args:
      raw: float [*B, k], any finite values.
      shape: the r axes of the index space.
      scale: what fraction of an axis a softplus of 1 stands for.
      minimum: the smallest sigma, in indices.

    Returns:
      Sigmas [*B, k, r] > 0, of the dtype of `raw`.

    Raises:
      ValueError: `raw` is not floating, or `shape`, `scale` or `minimum` is out of range.
    """
    raw = checks.as_arrays(raw)
    checks.check_float("raw", raw, 1, "[*B, k]")
    shape = checks.check_shape("shape", shape)
    if not scale > 0:
        raise ValueError(f"scale: got {scale}, want > 0")
    if not minimum >= 0:
        raise ValueError(f"minimum: got {minimum}, want >= 0")
    unit = materialize(jax.nn.softplus(raw))[..., None]
    sigmas = unit * per_axis(scale * np.asarray(shape), unit).astype(raw.dtype)
    return jnp.maximum(sigmas + minimum, jnp.finfo(raw.dtype).tiny)


def last_indices(shape: tuple[int, ...], dtype: jnp.dtype) -> np.ndarray:
    """The last index s - 1 of every axis, [r], rounded down where `dtype` is too short for it."""
    exact = np.asarray(shape, np.float64) - 1
    nearest = exact.astype(dtype)
    below = np.nextafter(nearest, np.zeros_like(nearest))
    return np.where(nearest.astype(np.float64) > exact, below, nearest)


def per_axis(axes: Sequence[float] | np.ndarray, x: jax.Array) -> np.ndarray:
    """One number per axis of the index space, [r], with as many axes as `x` [*B,r]."""
    return np.expand_dims(np.asarray(axes), tuple(range(x.ndim - 1)))
