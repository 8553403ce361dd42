"""What the plain functions share: dtypes that sums are made in, bounds, and dot products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype that sums are made in.

    Args:
      dtype: of what is summed, a floating one.

    Returns:
      float32, or float64 for float64.
    """
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def in_bounds(indices: jax.Array, size: int) -> jax.Array:
    """Which of int32 `indices` [...] lie in [0, size): bool [...]."""
    return (indices >= 0) & (indices < size)


def finite(top: jax.Array) -> jax.Array:
    """The largest logits [...], but 0 where all are -inf."""
    return jnp.where(top > -jnp.inf, top, 0)


def dot(subscripts: str, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """An einsum of two operands with sums in the accumulator's dtype, of which the result is.

    16-bit operands are multiplied as they are, float32 is not shortened.
    """
    precision = "highest" if lhs.dtype.itemsize >= 4 else "default"
    dtype = accumulator(lhs.dtype)
    return jnp.einsum(subscripts, lhs, rhs, precision=precision, preferred_element_type=dtype)


def gather_rows(dense: jax.Array, indices: jax.Array) -> jax.Array:
    """Rows of dense [j,d] at int32 indices [...]: [...,d], zeros where there is no such row."""
    rows = dense.at[indices]
    return rows.get(mode="fill", fill_value=0, wrap_negative_indices=False)


def nearest_rows(dense: jax.Array, indices: jax.Array) -> jax.Array:
    """Rows of dense [j,d] at int32 indices [...]: [...,d], any where there is no such row.

    For what is masked after it was multiplied: one test of bounds then suits both factors, and GPUs
    do all of it in one kernel.
    """
    return dense.at[indices].get(mode="clip", wrap_negative_indices=False)


def scatter_rows(indices: jax.Array, updates: jax.Array, out: jax.Array) -> jax.Array:
    """Adds updates [...,d] to the rows of out [j,d] at int32 indices [...]; absent ones nowhere."""
    return out.at[indices].add(updates, mode="drop", wrap_negative_indices=False)


def scaled(x: jax.Array, scale: float) -> jax.Array:
    """x * scale, of the dtype of x: exact for powers of 2, for others rounded once."""
    return (x.astype(accumulator(x.dtype)) * scale).astype(x.dtype)


@jax.custom_jvp
def materialize(x: jax.Array) -> jax.Array:
    """The same array, which CPUs keep in memory rather than compute anew wherever it is used.

    XLA on CPU fuses what computes tuples and points into all that is made of them, and then takes
    the exponential of one number at a time. It ignores `optimization_barrier`, but it fuses no
    reduction of several operands.

    Args:
      x: [*B], of any dtype.

    Returns:
      x.
    """
    return jax.lax.platform_dependent(x, cpu=_copy, default=lambda x: x)


def _copy(x):
    pairs = jnp.stack([x, jnp.zeros_like(x)])
    zero = np.zeros((), x.dtype)
    add = lambda a, b: (a[0] + b[0], a[1] + b[1])  # noqa: E731
    return jax.lax.reduce((pairs, pairs), (zero, zero), add, (0,))[0]


@materialize.defjvp
def _(primals, tangents):
    return materialize(*primals), tangents[0]


def sum_all(terms: list[jax.Array], axis: int) -> list[jax.Array]:
    """Sums several arrays over `axis` in one pass, keeping it."""
    zeros = tuple(np.zeros((), t.dtype) for t in terms)
    add = lambda a, b: tuple(map(jnp.add, a, b))  # noqa: E731
    sums = jax.lax.reduce(tuple(terms), zeros, add, (axis,))
    return [jnp.expand_dims(x, axis) for x in sums]


def sum_list(terms: list[jax.Array]) -> jax.Array:
    """The sum of the arrays of a list, which is not empty."""
    return functools.reduce(jnp.add, terms)
