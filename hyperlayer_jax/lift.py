"""Functions written for one chunk, lifted to any leading axes, on meshes of explicit axes too."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


def lift(signature: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`jnp.vectorize` whose arguments may be sharded over leading axes, or not.

    Args:
      signature: the axes of one chunk, such as "(k,r),(m)->(m)".

    Returns:
      A decorator.
    """
    ranks = [
        len([axis for axis in axes.strip("( )").split(",") if axis])
        for axes in signature.split("->", maxsplit=1)[0].split("),")
    ]

    def decorate(function):
        vectorized = jnp.vectorize(function, signature=signature)

        @functools.wraps(function)
        def lifted(*arrays):
            leading = [spec_of(x)[: x.ndim - rank] for x, rank in zip(arrays, ranks, strict=True)]
            if not any(axis for spec in leading for axis in spec):
                return vectorized(*arrays)
            batch = [next((a for a in axes if a), None) for axes in zip(*leading, strict=True)]
            return vectorized(*(jax.sharding.reshard(x, PartitionSpec(*batch)) for x in arrays))

        return lifted

    return decorate


def automatic(function: Callable[..., Any], *arrays: jax.Array | None, leading: int) -> Any:
    """`function(*arrays)`, run under automatic axes where arrays are sharded over explicit ones.

    Args:
      function: of arrays [*B, ...], or without the axes *B, to a pytree of arrays [*B, ...]. It
        must not close over arrays.
      *arrays: see `function`; None is passed on.
      leading: how many axes *B there are, the only ones that are sharded.

    Returns:
      What the function returns, its axes *B sharded as those of the arrays.
    """
    specs = [spec_of(x)[:leading] for x in arrays if x is not None and x.ndim >= leading]
    batch = [next((a for a in axes if a), None) for axes in zip(*specs, strict=True)]
    if not any(batch):
        return function(*arrays)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        results = jax.eval_shape(function, *shapes)
    shardings = jax.tree.map(lambda _: PartitionSpec(*batch), results)
    return jax.jit(jax.sharding.auto_axes(function, out_sharding=shardings))(*arrays)


def spec_of(x: jax.Array) -> tuple[Any, ...]:
    """What each axis of `x` is sharded over on a mesh of explicit axes; None elsewhere."""
    return tuple(jax.typeof(x).sharding.spec)


def reshape(x: jax.Array, shape: Sequence[int], *, leading: int = 1) -> jax.Array:
    """`x` [*B, ...] in another shape, *B sharded as it is where the mesh has explicit axes.

    Args:
      x: an array whose other axes are not sharded.
      shape: the new shape; its first axes are *B, or the last of them times the one that followed.
      leading: how many axes *B there are.
    """
    spec = spec_of(x)[:leading]
    return jnp.reshape(x, shape, out_sharding=PartitionSpec(*spec) if any(spec) else None)
