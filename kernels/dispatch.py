"""The one choice of backend, and what runs it.

`implementation=None` picks a backend at trace time; a name forces that backend. Where a forced
kernel is lowered for a CPU it runs in the interpret mode of Pallas; `None` runs plain JAX there.

To add a backend:

1. Write `<name>.py` beside `xla.py`: any of its functions, under their names and signatures, with a
   keyword `interpret`, for operands of exactly one batch axis and no empty axis; and
   `lacks(operation, *operands, **sizes)`: why it cannot serve these, in words, or "".
2. List the name in `_BACKENDS`. A name forces it from then on.
3. List in `_FASTER` where it is measured to be faster, for `implementation=None`.
"""

import functools
import importlib

import jax
import jax.numpy as jnp

from . import xla

_BACKENDS = ("xla", "triton", "triton_deterministic", "mosaic_gpu", "tpu")
# What `implementation=None` takes: for (platform, operation), pairs of a backend and a predicate of
# the operands. The first whose predicate holds, and which lacks nothing, serves; else "xla". Empty,
# since nothing has been measured on a GPU or TPU. A line that `benchmarks.run` could earn there:
#   ("gpu", "ell_spmm"): [("triton", lambda indices, values, dense: dense.shape[-1] >= 16)],
_FASTER = {}


def check(implementation):
    """Raises a ValueError unless `implementation` is None or the name of a backend."""
    if implementation not in (None, *_BACKENDS):
        names = ", ".join(map(repr, _BACKENDS))
        raise ValueError(f"implementation: got {implementation!r}, want None or one of {names}")


def _lacks(name, operation, operands, sizes):
    """Why backend `name` cannot serve `operation` on these operands; empty where it can."""
    module = _module(name)
    if module is xla:
        return ""
    if not hasattr(module, operation):
        return f"there is no {operation}"
    return module.lacks(operation, *operands, **sizes)


def _module(name):
    return importlib.import_module(f"{__package__}.{name}")


def _choose(implementation, operation, operands, sizes):
    """The name of the backend to serve `operation`; the operands have exactly one batch axis."""
    if implementation is None:
        for name, faster in _FASTER.get((jax.default_backend(), operation), ()):
            if faster(*operands, **sizes) and not _lacks(name, operation, operands, sizes):
                return name
        return "xla"
    if lacks := _lacks(implementation, operation, operands, sizes):
        raise NotImplementedError(f"implementation: got {implementation!r}, but {lacks}")
    return implementation


def run(implementation, operation, leading, results, *operands, **sizes):
    """Runs an operation on the backend that serves it; empty sums are 0.

    Args:
      implementation: a backend by name, or None to choose.
      operation: the name of a function of `xla`.
      leading: the number of batch axes *B.
      results: the shapes [*B,...] and dtypes of what it returns, a pytree.
      *operands: arrays [*B,...].
      **sizes: its static keywords.

    Returns:
      Arrays like `results`.
    """
    if any(0 in x.shape for x in (*operands, *jax.tree.leaves(results))):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), results)
    flat = [x.reshape(-1, *x.shape[leading:]) for x in operands]
    name = _choose(implementation, operation, flat, sizes)
    plain = functools.partial(getattr(xla, operation), **sizes)
    if name == "xla":
        return plain(*operands)
    kernel = functools.partial(getattr(_module(name), operation), **sizes)
    on_cpu = plain if implementation is None else functools.partial(kernel, interpret=True)
    on_device = functools.partial(kernel, interpret=False)

    @jax.custom_batching.custom_vmap
    def serve(*operands):
        return jax.lax.platform_dependent(*operands, cpu=on_cpu, default=on_device)

    @serve.def_vmap
    def _(size, mapped, *operands):
        operands = [
            x if own else jnp.broadcast_to(x, (size, *x.shape))
            for x, own in zip(operands, mapped, strict=True)
        ]
        out = serve(*(x.reshape(-1, *x.shape[2:]) for x in operands))
        out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return jax.tree.map(lambda x, like: x.reshape(like.shape), serve(*flat), results)
