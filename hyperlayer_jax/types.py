"""The three pytrees that the library passes around.

They only carry arrays: shapes and dtypes are checked by the functions that take them, so that
they can hold tracers, gradients and specs as any pytree can.
"""

import dataclasses

import jax


class _Sized:
    """Lists of sizes become tuples, which `jit` takes."""

    def __post_init__(self):
        for name in ("out_shape", "in_shape"):
            if isinstance(shape := getattr(self, name), list):
                object.__setattr__(self, name, tuple(shape))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IndexTuples:
    """Index tuples as a hypernetwork emits them.

    Attributes:
      means: float [*B, k, r], points in the index space, one coordinate per learned column, in
        [0, s - 1] for an axis of length s.
      sigmas: float [*B, k, r], standard deviations, >= 0, in units of indices.
      values: float [*B, k], the value each tuple spreads over the points of its chunk.

    The last of the leading axes `*B` numbers the chunks: copies are dropped and proportions are
    normalised within a chunk.
    """

    means: jax.Array
    sigmas: jax.Array
    values: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseTensor(_Sized):
    """A sparse tensor as a list of coordinates (COO). Entries at the same coordinate add up.

    Attributes:
      indices: int32 [*B, n, R], coordinates, those of the output before those of the input, so
        R = len(out_shape) + len(in_shape).
      values: float [*B, n].
      out_shape: the axes of the output, static.
      in_shape: the axes of the input that are summed over, static.
    """

    indices: jax.Array
    values: jax.Array
    out_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    in_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSparseTensor(_Sized):
    """A sparse tensor in which every output owns p entries (ELL), contracted without a scatter.

    Attributes:
      indices: int32 [*B, rows, p, r], coordinates in the input, r = len(in_shape); row i is entry
        i of the flattened output, so rows = prod(out_shape).
      values: float [*B, rows, p].
      out_shape: the axes of the output, static.
      in_shape: the axes of the input that are summed over, static.
    """

    indices: jax.Array
    values: jax.Array
    out_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    in_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
