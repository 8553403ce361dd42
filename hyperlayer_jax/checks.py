"""Argument checks, made at trace time from shapes and dtypes alone."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hyperlayer_jax.kernels import accumulator
from hyperlayer_jax.types import IndexTuples, RowSparseTensor, SparseTensor

INT32_MAX = 2**31 - 1
# The last index up to which float32 holds every one.
FLOAT32_MAX = 2**24


def as_arrays(tree: Any) -> Any:
    """The NumPy arrays of a pytree as JAX arrays, of the dtypes that JAX would give them."""
    return jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, tree)


def check_shape(name: str, shape: Sequence[int], rank: int | None = None) -> tuple[int, ...]:
    """Returns `shape` as a tuple of ints: axes of 1 to 2^31 - 1, `rank` of them where given."""
    try:
        axes = tuple(operator.index(s) for s in shape)
    except TypeError:
        raise ValueError(f"{name}: got {shape!r}, want a sequence of ints") from None
    if not axes or not all(1 <= s <= INT32_MAX for s in axes):
        raise ValueError(f"{name}: got {axes}, want at least one axis, each of 1 to 2^31 - 1")
    if rank is not None and len(axes) != rank:
        raise ValueError(f"{name}: got {axes}, want {rank} axes, one for each learned column")
    return axes


def check_size(name: str, shape: tuple[int, ...]) -> int:
    """Returns the number of entries of `shape`, which must be countable in int32."""
    size = math.prod(shape)
    if size > INT32_MAX:
        raise ValueError(f"{name}: got {shape} with {size} entries, want at most 2^31 - 1")
    return size


def check_count(name: str, count: int) -> int:
    """Returns `count` as an int >= 0."""
    try:
        number = operator.index(count)
    except TypeError:
        raise ValueError(f"{name}: got {count!r}, want an int >= 0") from None
    if number < 0:
        raise ValueError(f"{name}: got {number}, want an int >= 0")
    return number


def check_positive(name: str, count: int) -> int:
    """Returns `count` as an int >= 1."""
    if (number := check_count(name, count)) == 0:
        raise ValueError(f"{name}: got 0, want at least 1")
    return number


def check_sigmas(sigma_scale: float, min_sigma: float) -> None:
    """Wants a scale > 0 and a smallest sigma >= 0."""
    if not sigma_scale > 0:
        raise ValueError(f"sigma_scale: got {sigma_scale}, want > 0")
    if not min_sigma >= 0:
        raise ValueError(f"min_sigma: got {min_sigma}, want >= 0")


def check_columns(name: str, columns: Sequence[int], width: int) -> tuple[int, ...]:
    """Returns `columns` as a tuple of different ints in [0, width)."""
    want = f"want different columns of a template of {width}"
    try:
        numbers = tuple(operator.index(c) for c in columns)
    except TypeError:
        raise ValueError(f"{name}: got {columns!r}, {want}") from None
    if len(set(numbers)) != len(numbers) or not set(numbers) <= set(range(width)):
        raise ValueError(f"{name}: got {numbers}, {want}")
    return numbers


def check_float(name: str, x: jax.Array, min_ndim: int, axes: str) -> None:
    """Wants `x` to be floating with at least `min_ndim` axes, written `axes`."""
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name}: got {getattr(x, 'dtype', type(x))}, want a floating array")
    if x.ndim < min_ndim:
        raise ValueError(f"{name}: got shape {x.shape}, want {axes}")


def check_indices(name: str, indices: jax.Array, min_ndim: int, axes: str) -> None:
    """Wants `indices` to be int32 with at least `min_ndim` axes, written `axes`."""
    if not hasattr(indices, "dtype") or indices.dtype != jnp.int32:
        raise ValueError(f"{name}: got {getattr(indices, 'dtype', type(indices))}, want int32")
    if indices.ndim < min_ndim or indices.shape[-1] == 0:
        raise ValueError(f"{name}: got shape {indices.shape}, want {axes}")


def check_tuples(tuples: IndexTuples) -> None:
    """Wants means and sigmas [*B, k, r] and values [*B, k], all floating."""
    check_float("tuples.means", tuples.means, 2, "[*B, k, r]")
    check_float("tuples.sigmas", tuples.sigmas, 2, "[*B, k, r]")
    check_float("tuples.values", tuples.values, 1, "[*B, k]")
    if tuples.means.shape[-1] == 0:
        raise ValueError(f"tuples.means: got shape {tuples.means.shape}, want r >= 1")
    if tuples.sigmas.shape != tuples.means.shape:
        raise ValueError(
            f"tuples.sigmas: got shape {tuples.sigmas.shape}, "
            f"want that of the means, {tuples.means.shape}"
        )
    if tuples.values.shape != tuples.means.shape[:-1]:
        raise ValueError(
            f"tuples.values: got shape {tuples.values.shape}, "
            f"want one for each tuple, {tuples.means.shape[:-1]}"
        )


def accumulator_of(tuples: IndexTuples) -> jnp.dtype:
    """The dtype that tuples are computed in: float64 if any of their arrays is, else float32."""
    dtypes = {accumulator(x.dtype) for x in (tuples.means, tuples.sigmas, tuples.values)}
    return jnp.float64 if jnp.float64 in dtypes else jnp.float32


def check_countable(name: str, shape: tuple[int, ...], dtype: jnp.dtype) -> None:
    """Wants axes whose indices `dtype`, float32 or float64, can all tell apart."""
    if dtype == jnp.float32 and max(shape) > FLOAT32_MAX + 1:
        raise ValueError(
            f"{name}: got {shape}, want axes of at most 2^24 + 1, as far as float32 tells indices "
            "apart, or float64"
        )


def check_mask(name: str, mask: jax.Array, shape: tuple[int, ...]) -> None:
    """Wants `mask` to be bool of `shape`."""
    if getattr(mask, "dtype", None) != jnp.bool_ or mask.shape != tuple(shape):
        got = f"{getattr(mask, 'dtype', type(mask))}{list(getattr(mask, 'shape', ()))}"
        raise ValueError(f"{name}: got {got}, want bool{list(shape)}")


def check_tensor(
    tensor: SparseTensor | RowSparseTensor,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Returns *B, out_shape and in_shape of a tensor whose arrays fit its static shapes."""
    if not isinstance(tensor, SparseTensor | RowSparseTensor):
        raise ValueError(f"tensor: got {type(tensor)}, want a SparseTensor or RowSparseTensor")
    out_shape = check_shape("tensor.out_shape", tensor.out_shape)
    in_shape = check_shape("tensor.in_shape", tensor.in_shape)
    num_rows = check_size("tensor.out_shape", out_shape)
    check_size("tensor.in_shape", in_shape)
    by_row = isinstance(tensor, RowSparseTensor)
    axes = "[*B, rows, p, r]" if by_row else "[*B, n, R]"
    check_indices("tensor.indices", tensor.indices, 3 if by_row else 2, axes)
    check_float("tensor.values", tensor.values, 2 if by_row else 1, axes[:-4] + "]")
    *entries, columns = tensor.indices.shape
    if tensor.values.shape != tuple(entries):
        raise ValueError(
            f"tensor.values: got shape {tensor.values.shape}, "
            f"want one for each of the indices, {tuple(entries)}"
        )
    want = len(in_shape) if by_row else len(out_shape) + len(in_shape)
    if columns != want:
        raise ValueError(
            f"tensor.indices: got {columns} columns, want {want} for out_shape = {out_shape} "
            f"and in_shape = {in_shape}"
        )
    if by_row and entries[-2] != num_rows:
        raise ValueError(
            f"tensor.indices: got {entries[-2]} rows, want {num_rows} for out_shape = {out_shape}"
        )
    return tuple(entries[: -2 if by_row else -1]), out_shape, in_shape
