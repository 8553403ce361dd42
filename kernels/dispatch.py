"""Who serves an operation: plain JAX on every device, and the kernels of a backend.

`implementation=` names a backend, or is None for what is best on the device at hand:

- "reference": the meaning of the operation, plain JAX that is good on any device;
- "cpu": the same, made fast where XLA on CPU needs help;
- "mosaic_gpu", "triton", "tpu": Pallas kernels.

None takes a kernel where `FASTER` has a line for the device, and plain JAX elsewhere: "cpu" on
CPUs, if there is one, and "reference" on other devices. Where a named kernel is lowered for a CPU,
it runs in the interpret mode of Pallas.

To add a backend to an operation: write `<backend>.py` into the operation's folder, with functions
of the names and signatures of `reference.py`, a keyword `interpret`, for operands of exactly one
batch axis, none of them empty, and `lacks(operation, *operands, **sizes)`, why it cannot serve
these in words, or ""; and list it in `SERVES`. Once it is measured to be faster, list it in
`FASTER`.
"""

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

# The backends of each operation, and the folder that they are in.
_PRODUCTS = ("reference", "cpu", "tpu")
SERVES = {
    "ell_spmm": _PRODUCTS,
    "ell_spmm_transposed": _PRODUCTS,
    "ell_sddmm": _PRODUCTS,
    "spmm": _PRODUCTS,
    "sddmm": _PRODUCTS,
    "row_max": ("reference",),
    "redistribute": ("reference", "cpu", "tpu"),
    "shares": ("reference", "cpu"),
    "duplicate_mask": ("reference", "cpu"),
    "gathered_attention": ("reference", "triton", "tpu"),
    "block_attention": ("reference", "mosaic_gpu", "tpu"),
    "masked_block_attention": ("reference", "mosaic_gpu"),
}
_FOLDERS = dict.fromkeys(("redistribute", "shares", "duplicate_mask"), "redistribution")
_FOLDERS |= dict.fromkeys(
    ("gathered_attention", "block_attention", "masked_block_attention"), "attention"
)
_PLAIN = ("reference", "cpu")
_PLATFORMS = {"mosaic_gpu": ("cuda",), "triton": ("cuda", "rocm"), "tpu": ("tpu",)}
INTERPRETED_WITH_EFFECTS = ("mosaic_gpu",)
BACKENDS = (*_PLAIN, *_PLATFORMS)

# The kernels that `implementation=None` takes, by the beginning of the name of the device (its
# `device_kind`). Each line earned its place: right, with the same bits in each of eleven runs
# unless it says otherwise, and faster than plain JAX at both lengths, 16k and 64k tokens.
_HOPPER = {
    # Forward and backward on an H200 .74 and 2.55 ms, plain JAX 8.8 and 29.8; on an H100 .62 and
    # 2.33, dense attention 2.4 and 34 (benchmarks/results/h200.json, h100.json).
    "block_attention": "mosaic_gpu",
    # On an H200 2.4 and 9.3 ms, plain JAX 3.9 and 14.5; on an H100 right, but not measured.
    # Gradients of keys and values add up in any order, as those of plain JAX do on a GPU.
    "gathered_attention": "triton",
}
FASTER = {"NVIDIA H200": _HOPPER, "NVIDIA H100": _HOPPER}


def implementations(operation: str) -> tuple[str, ...]:
    """The backends that serve an operation.

    Args:
      operation: the name of a function of `hyperlayer_jax.kernels`, such as "ell_spmm".

    Returns:
      What its `implementation=` may be beside None, "reference" first.

    Raises:
      ValueError: there is no such operation.
    """
    if operation not in SERVES:
        raise ValueError(f"operation: got {operation!r}, want one of {', '.join(SERVES)}")
    return SERVES[operation]


def serving(implementation: str | None, operation: str) -> str | None:
    """The backend that was named where it serves an operation, and None, to choose, elsewhere.

    For what comes down to several operations, not all of which every backend serves.

    Args:
      implementation: a backend by name, or None.
      operation: see `implementations`.

    Returns:
      `implementation` or None.

    Raises:
      ValueError: there is no such operation or backend.
    """
    check(implementation)
    return implementation if implementation in implementations(operation) else None


def check(implementation: str | None) -> None:
    """Raises a ValueError unless `implementation` is None or the name of a backend."""
    if implementation not in (None, *BACKENDS):
        names = ", ".join(map(repr, BACKENDS))
        raise ValueError(f"implementation: got {implementation!r}, want None or one of {names}")


def choose(
    *,
    implementation: str | None,
    operation: str,
    operands: Sequence[Any],
    leading: int,
    sizes: Any,
    gradient: bool = False,
) -> str | None:
    """The backend to serve an operation, or None for what is plain JAX on the device.

    Args:
      implementation: a backend by name, or None to choose.
      operation: a name of `SERVES`.
      operands: arrays [*B,...], or what else has shapes and dtypes.
      leading: the number of batch axes *B.
      sizes: the static keywords of the operation, a dict or its items.
      gradient: whether it is the gradient of the operation that is wanted.

    Raises:
      NotImplementedError: the backend named cannot serve these operands.
    """
    flat = [
        jax.ShapeDtypeStruct((math.prod(x.shape[:leading]), *x.shape[leading:]), x.dtype)
        for x in operands
    ]
    lacks = functools.partial(_lacks, operation, gradient, flat, dict(sizes))
    if implementation is None:
        kind = jax.devices()[0].device_kind
        for device, fastest in FASTER.items():
            if kind.startswith(device) and (name := fastest.get(operation)) and not lacks(name):
                return name
        return None
    if why := lacks(implementation):
        raise NotImplementedError(f"implementation: got {implementation!r}, but {why}")
    return implementation


def _lacks(operation, gradient, operands, sizes, name):
    """Why backend `name` cannot serve an operation on these operands; empty where it can."""
    if name not in SERVES[operation]:
        return f"there is no {operation}"
    if name in _PLAIN or any(0 in x.shape for x in operands):
        return ""
    if not all(isinstance(size, int) for x in operands for size in x.shape):
        return "a kernel needs sizes that are numbers"
    return _module(name, operation).lacks(operation + "_grad" * gradient, *operands, **sizes)


def _module(name, operation):
    folder = _FOLDERS.get(operation, "products")
    return importlib.import_module(f"{__package__}.{folder}.{name}")


def reference(operation: str) -> Callable[..., Any]:
    """The meaning of an operation."""
    return getattr(_module("reference", operation), operation)


def run(
    *,
    implementation: str | None,
    operation: str,
    operands: Sequence[jax.Array],
    leading: int,
    sizes: dict[str, Any],
    gradient: bool = False,
    platform: str,
    partitioned: bool,
) -> Any:
    """Runs an operation, or its gradient, on the backend that serves it.

    Args:
      implementation: see `choose`.
      operation: see `choose`.
      operands: arrays [*B,...], none of them empty.
      leading: see `choose`.
      sizes: see `choose`.
      gradient: see `choose`.
      platform: what the program is made for: "cpu", "cuda", "tpu" and so on.
      partitioned: whether the compiler is to divide the program among devices, which it cannot do
        with a kernel, nor well where members of a batch go one by one; inside `shard_map` it is
        divided already.

    Returns:
      What the function of the backend returns, with batch axes *B.

    Raises:
      NotImplementedError: the backend named does not run on the platform.
    """
    name = choose(
        implementation=implementation,
        operation=operation,
        operands=operands,
        leading=leading,
        sizes=sizes,
        gradient=gradient,
    )
    runs_on = _PLATFORMS.get(name or "", ())
    if implementation is None and (partitioned or platform not in runs_on):
        for_cpu = platform == "cpu" and not partitioned and "cpu" in SERVES[operation]
        name = "cpu" if for_cpu else "reference"
    function = getattr(_module(name, operation), operation + "_grad" * gradient)
    if name in _PLAIN:
        return function(*operands, **sizes)
    if platform not in ("cpu", *runs_on):
        raise NotImplementedError(
            f"implementation: got {name!r}, but it runs on {runs_on[0]}, not on {platform}"
        )
    batch = operands[0].shape[:leading]
    flat = [x.reshape(math.prod(batch), *x.shape[leading:]) for x in operands]
    out = function(*flat, **sizes, interpret=platform == "cpu")
    return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), out)
