"""What a sparse linear layer asks of a batch of inputs, dense or sparse."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hyperlayer_jax.kernels import in_bounds
from hyperlayer_jax.nn.candidates import norms, random_sums
from hyperlayer_jax.tensors import ravel
from hyperlayer_jax.types import RowSparseTensor

_ABSENT = jnp.iinfo(jnp.int32).max


class DenseInputs(NamedTuple):
    """Inputs x [n, i], all of which are candidates for a weight."""

    x: jax.Array

    @property
    def num_candidates(self) -> int:
        return self.x.shape[1]

    def names(self, candidates: jax.Array) -> jax.Array:
        """The columns of candidates, given by number."""
        return candidates

    def read(self, columns: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Columns int32 [...] as rows of an array: which [...], and that array [*, n].

        A batch has to be turned for products with few weights; of a very wide one, only what is
        used.
        """
        if columns.size >= self.x.shape[1]:
            return columns, self.x.T
        used = jnp.take(self.x, columns.ravel(), axis=1).T
        return jnp.arange(columns.size, dtype=jnp.int32).reshape(columns.shape), used

    def column_norms(self, chance: jax.Array, dy: jax.Array) -> jax.Array:
        """For each candidate [i], the norm of the gradients x^T dy^T of its weights, estimated."""
        return norms(random_sums(chance, dy), self.x)

    def row_norms(self, chance: jax.Array, dy: jax.Array) -> jax.Array:
        """For each output [o], the same."""
        return norms(random_sums(chance, self.x.T), dy.T)


class SparseInputs(NamedTuple):
    """Inputs of which each of n has p stored entries; those that occur are candidates.

    Nothing is larger than a row [n] for each weight, or for each candidate of one.
    """

    columns: jax.Array
    values: jax.Array

    @classmethod
    def of(cls, x: RowSparseTensor) -> "SparseInputs":
        """The rows of a tensor; entries outside of it are absent."""
        columns = ravel(x.indices, x.in_shape)
        present = in_bounds(columns, math.prod(x.in_shape))
        return cls(jnp.where(present, columns, _ABSENT), x.values)

    @property
    def num_candidates(self) -> int:
        return self.columns.size

    def names(self, candidates: jax.Array) -> jax.Array:
        """The columns of candidates, given by number."""
        return jnp.sort(self.columns.ravel())[candidates]

    def read(self, columns: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `DenseInputs`."""
        order = jnp.sort(columns.ravel())
        slots = jnp.searchsorted(order, self.columns).astype(jnp.int32)
        there = jnp.take(order, slots, mode="clip") == self.columns
        there &= self.columns != _ABSENT
        slots = jnp.where(there, slots, order.size)
        examples = jnp.arange(len(slots), dtype=jnp.int32)[:, None]
        rows = jnp.zeros((order.size, len(slots)), self.values.dtype)
        rows = rows.at[slots, examples].add(self.values, mode="drop")
        return jnp.searchsorted(order, columns).astype(jnp.int32), rows

    def _numbers(self):
        """Of every entry [n, p], the first candidate that has its column."""
        return jnp.searchsorted(jnp.sort(self.columns.ravel()), self.columns)

    def _present(self):
        return jnp.where(self.columns == _ABSENT, 0, self.values.astype(jnp.float32))

    def column_norms(self, chance: jax.Array, dy: jax.Array) -> jax.Array:
        """See `DenseInputs`; 0 for all candidates of a column but the first."""
        sums = random_sums(chance, dy).T
        added = self._present()[..., None] * sums[:, None]
        sums = jnp.zeros((self.columns.size, sums.shape[1])).at[self._numbers()].add(added)
        return jnp.sqrt((sums**2).mean(-1))

    def row_norms(self, chance: jax.Array, dy: jax.Array) -> jax.Array:
        """See `DenseInputs`."""
        signs = jnp.where(chance < 0.5, -1.0, 1.0)[:, self._numbers()]
        return norms(jnp.einsum("qnp,np->qn", signs, self._present()), dy.T)
