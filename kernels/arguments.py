"""Checks of arguments, made at trace time from shapes and dtypes."""

import operator

import jax
import jax.numpy as jnp

from . import dispatch

_POSITIONS = ("indices", "block_indices", "rows", "cols", "points")
_MASKS = ("where", "mask")
_FLOATS = ("bfloat16", "float32", "float64")


def check(implementation: str | None, **arguments) -> list[jax.Array]:
    """Raises a ValueError unless shapes and dtypes agree.

    Args:
      implementation: None or a backend by name.
      **arguments: (array, axes): a name for each trailing axis, equal names equal sizes. Positions
        are int32, masks bool; all other arguments share one float dtype, but that log_weights may
        have another.

    Returns:
      The arguments as arrays.
    """
    dispatch.check(implementation)
    arrays = [jnp.asarray(array) for array, _ in arguments.values()]
    sizes: dict[str, int] = {}
    batch, dtype = None, None
    for array, (name, (_, axes)) in zip(arrays, arguments.items(), strict=True):
        lead, trailing = array.shape[: -len(axes)], array.shape[-len(axes) :]
        batch = lead if batch is None else batch
        expected = tuple(
            sizes.setdefault(axis, size) for axis, size in zip(axes, trailing, strict=False)
        )
        if array.ndim < len(axes) or lead != batch or trailing != expected:
            known = "".join(f", {axis} = {sizes[axis]}" for axis in axes if axis in sizes)
            raise ValueError(
                f"{name}: got shape {array.shape}, want [*B,{','.join(axes)}] with "
                f"*B = {batch}{known}"
            )
        if name in _POSITIONS or name in _MASKS:
            want = "bool" if name in _MASKS else "int32"
            if array.dtype != want:
                raise ValueError(f"{name}: got {array.dtype}, want {want}")
        elif array.dtype.name not in _FLOATS:
            raise ValueError(f"{name}: got {array.dtype}, want one of {', '.join(_FLOATS)}")
        elif name != "log_weights" and array.dtype != (dtype := dtype or array.dtype):
            raise ValueError(f"{name}: got {array.dtype}, want {dtype} like the others")
    return arrays


def check_size(name: str, size: int, *, minimum: int = 0) -> int:
    """Returns `size` as an int of at least `minimum`."""
    try:
        number = operator.index(size)
    except TypeError:
        number = minimum - 1
    if number < minimum:
        raise ValueError(f"{name}: got {size!r}, want a static integer of at least {minimum}")
    return number


def check_axis(name: str, array: jax.Array, axis: str) -> None:
    """The last axis of `array`, called `axis`, must not be empty."""
    if array.shape[-1] == 0:
        raise ValueError(f"{name}: got shape {array.shape}, want {axis} >= 1")
