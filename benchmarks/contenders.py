"""What is compared: ways to compute a case, and the backends of our kernels by name."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from hyperlayer_jax import kernels

# Backends that would only be interpreted on a device, or that are meant for another.
_ELSEWHERE = {
    "cpu": ("mosaic_gpu", "triton", "tpu"),
    "gpu": ("cpu", "tpu"),
    "tpu": ("cpu", "mosaic_gpu", "triton"),
}
# Plain JAX, what every backend is measured against.
PLAIN = ("reference",)


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    Attributes:
      function: of `arguments`; compiled unless `on_host`.
      arguments: arrays.
      gradients: the positions of the arguments in which it is differentiated.
      same: whether it computes what the first contender does, and is to be checked with it.
      implementation: the name of the backend that it forces, if any.
      on_host: whether `function` is plain Python.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    gradients: tuple[int, ...] = ()
    same: bool = True
    implementation: str | None = None
    on_host: bool = False

    def with_gradients(self) -> "Contender":
        """The same with its gradients."""
        function = value_and_gradients(self.function, *self.gradients)
        return dataclasses.replace(self, function=function)


def by_name(
    operation: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    gradients: tuple[int, ...],
) -> dict[str, Contender]:
    """What is chosen by default for `operation`, under its name, and each backend by its own.

    Args:
      operation: a function of `hyperlayer_jax.kernels`.
      function: of `arguments` and the keyword `implementation`.
      arguments: arrays.
      gradients: see `Contender`.
    """
    named = {operation: Contender(function, arguments, gradients)}
    for name in implementations(operation):
        forced = functools.partial(function, implementation=name)
        named[name] = Contender(forced, arguments, gradients, implementation=name)
    return named


def with_gradients(contenders: dict[str, Contender]) -> dict[str, Contender]:
    """All of them, differentiated."""
    return {label: contender.with_gradients() for label, contender in contenders.items()}


def implementations(operation: str) -> tuple[str, ...]:
    """The backends of an operation of `hyperlayer_jax.kernels` that this device is meant for."""
    known = kernels.implementations(operation)
    return tuple(name for name in known if name not in _ELSEWHERE[jax.default_backend()])


def adds_in_any_order(implementation: str | None) -> bool:
    """Whether a backend, or plain JAX for None, may give other bits in every run: by atomics."""
    return jax.default_backend() == "gpu" and implementation in (None, *PLAIN, "triton")


def value_and_gradients(function: Callable[..., jax.Array], *positions: int) -> Callable[..., Any]:
    """`function` with its gradients in the arguments at `positions`, for itself as the cotangent.

    For ones, compilers would take short cuts, and the gradients of what conserves a sum be 0.
    """

    def run(*arguments):
        def of_floats(*floats):
            full = list(arguments)
            for position, value in zip(positions, floats, strict=True):
                full[position] = value
            return function(*full)

        out, vjp = jax.vjp(of_floats, *(arguments[position] for position in positions))
        return out, vjp(out)

    return run
