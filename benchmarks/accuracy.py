"""How far results are from what is expected, and whether they come again bit by bit."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.contenders import Contender, adds_in_any_order

_runs = 11
_MAX_ERROR = {"bfloat16": 1e-2, "float32": 1e-5}


def only_try() -> None:
    """From here on two runs have to give the same bits."""
    global _runs  # noqa: PLW0603
    _runs = 2


def in_float32(contender: Contender) -> Callable[[], Any]:
    """What the contender computes on float32 operands, without shortcuts of the hardware.

    On a GPU without Triton's matrix products, which take a minute to compile for float32.
    """
    on_gpu = jax.default_backend() == "gpu"
    options = {"xla_gpu_enable_triton_gemm": False} if on_gpu else None

    def run():
        arguments = jax.tree.map(
            lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x,
            contender.arguments,
        )
        with jax.default_matmul_precision("highest"):
            return jax.jit(contender.function, compiler_options=options)(*arguments)

    return run


def agreement(run: Callable[[int], Any], result: Any, expected: Any) -> dict[str, Any]:
    """How far a result is from what is expected, and whether it comes again bit by bit.

    Args:
      run: makes the result anew.
      result: a pytree.
      expected: one of as many leaves, or None.

    Returns:
      `relative_errors`, of each leaf, in the 2-norm; `same_bits`, in all of eleven runs.
    """
    figures: dict[str, Any] = {}
    leaves = jax.tree.leaves(result)
    if expected is not None:
        errors = _relative_errors(leaves, jax.tree.leaves(expected))
        figures["relative_errors"] = [float(f"{error:.3g}") for error in errors]
    again = [_same_bits(jax.tree.leaves(run(n)), leaves) for n in range(1, _runs)]
    figures["same_bits"] = all(map(bool, again))
    return figures


def agrees(figures: dict[str, Any], dtype: str, implementation: str | None) -> bool:
    """Whether what `agreement` found is within the limits of `dtype`, for this backend."""
    errors = figures.get("relative_errors", ())
    repeats = figures["same_bits"] or adds_in_any_order(implementation)
    return repeats and all(error < _MAX_ERROR[dtype] for error in errors)


@jax.jit
def _relative_errors(results, expected):
    def error(x, y):
        x, y = x.astype(jnp.float32).ravel(), y.astype(jnp.float32).ravel()
        return jnp.linalg.norm(x - y) / jnp.maximum(jnp.linalg.norm(y), 1e-30)

    return [error(x, y) for x, y in zip(results, expected, strict=True)]


@jax.jit
def _same_bits(left, right):
    pairs = zip(left, right, strict=True)
    same = [jnp.array_equal(x, y, equal_nan=x.dtype != bool) for x, y in pairs]
    return jnp.stack(same).all()


def difference(result: Any, expected: Any) -> float:
    """The largest between the leaves of two pytrees, however these are cut up."""
    both = [jax.tree.leaves(tree) for tree in (result, expected)]
    if [x.shape for x in both[0]] == [x.shape for x in both[1]]:
        return float(_largest_difference(*both))
    flat = [np.concatenate([np.ravel(x).astype(np.float64) for x in leaves]) for leaves in both]
    return float(np.abs(flat[0] - flat[1]).max(initial=0))


@jax.jit
def _largest_difference(left, right):
    pairs = zip(left, right, strict=True)
    each = [jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32)) for x, y in pairs]
    return jnp.stack([x.max(initial=0) for x in each]).max()
