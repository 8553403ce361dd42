"""What models say of examples that are held out, compiled, and a part of the examples at a time."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a function of a model and arrays; the model stays as it is.

    Compiled once for each structure of the model, shapes of arrays and options, and for all
    callers. Random streams do not advance: what is drawn, is drawn alike in every call.

    Args:
      function: `(model, *arrays, **options) -> arrays`, options hashable. Where it means a model in
        evaluation, it says so by `deterministic`.
    """

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run(options, graphdef, state, *arrays):
        return function(nnx.merge(graphdef, state, copy=True), *arrays, **dict(options))

    @functools.wraps(function)
    def call(model, *arrays, **options):
        return run(tuple(sorted(options.items())), *nnx.split(model), *arrays)

    return call


def deterministic(model: nnx.Module) -> nnx.Module:
    """The model as it is evaluated: draws nothing, drops nothing."""
    return nnx.view(model, deterministic=True, raise_if_not_found=False)


def in_parts(function: Callable[..., Any], *arrays: np.ndarray, at_once: int) -> np.ndarray:
    """Calls a function for a few examples at a time, since memory holds no more; joins the results.

    Args:
      function: of parts of the arrays; returns an array with a first axis of examples.
      *arrays: with a first axis of n examples.
      at_once: the most examples in a part. Parts are as equal as can be, so that few shapes are
        compiled.

    Returns:
      An array [n, ...].
    """
    count = math.ceil(len(arrays[0]) / at_once)
    parts = zip(*(np.array_split(x, count) for x in arrays), strict=True)
    return np.concatenate([function(*part) for part in parts])
