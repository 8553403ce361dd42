"""The sparse linear layer."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from hyperlayer_jax import checks, kernels
from hyperlayer_jax.nn.candidates import SUMS, chances, draw, num_candidates, unravel
from hyperlayer_jax.nn.exploring import explore
from hyperlayer_jax.nn.hyperlayer import axes, check_input
from hyperlayer_jax.nn.inputs import DenseInputs, SparseInputs
from hyperlayer_jax.nn.sampler import Sampler
from hyperlayer_jax.nn.tuples import FixedTuples, FreeTuples, PlacedTuples
from hyperlayer_jax.tensors import ravel
from hyperlayer_jax.types import RowSparseTensor, SparseTensor


class SparseLinear(nnx.Module):
    """A linear layer that learns which of its weights exist: y = W x + b, W of few weights.

    The weights sit at integer places, so training computes what evaluation does, at the cost of
    the weights alone. An optimizer in `jumps` moves those of little use to where others would help:

        optimizer = jumps(key, model, optax.adam(1e-3), until=1500)
        optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)

    Without `jumps` they stay where they are, whatever the optimizer.

    With a `sampler` or fixed `values` they are tuples as in the paper instead, which move by
    gradient: one W serves a whole batch, and is sampled anew at every call.
    """

    def __init__(
        self,
        in_shape: int | Sequence[int],
        out_shape: int | Sequence[int],
        num_tuples: int,
        *,
        by_output: bool = False,
        values: float | None = None,
        sigma_scale: float = 0.1,
        min_sigma: float = 0.0,
        sampler: Sampler | None = None,
        use_bias: bool = False,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        """Makes the layer.

        Args:
          in_shape: the axes of the input.
          out_shape: the axes of the output.
          num_tuples: k, the weights that there are for each output.
          by_output: whether each output owns its k weights, whose inputs alone are learned;
            otherwise outputs may have more or less of them.
          values: the value of every tuple, fixed; learned where None.
          sigma_scale: see `transform_sigmas`; this and what follows for tuples as in the paper.
          min_sigma: the smallest sigma, in indices.
          sampler: of points; where None and values are fixed, `Sampler(evaluation="round")`.
          use_bias: adds a learned [*out_shape], 0 at first.
          implementation: the kernel backend for what it serves, chosen by device where None.
          rngs: the stream `params`, and `sample` for tuples as in the paper.

        Raises:
          ValueError: a shape is out of range, or there are more weights than places.
        """
        self.in_shape, self.out_shape = axes("in_shape", in_shape), axes("out_shape", out_shape)
        num_rows = math.prod(self.out_shape)
        count = checks.check_positive("num_tuples", num_tuples) * (1 if by_output else num_rows)
        chunks = (num_rows,) if by_output else ()
        space = self.in_shape if by_output else self.out_shape + self.in_shape
        self.tuples: FixedTuples | FreeTuples
        if values is None and sampler is None:
            # As in a dense layer: outputs vary as inputs do.
            self.tuples = PlacedTuples(chunks, count, space, scale=num_tuples**-0.5, rngs=rngs)
        else:
            self.tuples = FreeTuples(
                chunks, count, space,
                values=values, sigma_scale=sigma_scale, min_sigma=min_sigma, rngs=rngs,
            )  # fmt: skip
            sampler = Sampler(evaluation="round", rngs=rngs) if sampler is None else sampler
        self.sampler: Sampler | None = nnx.data(sampler)
        self.by_output = by_output
        self.implementation = implementation
        self.bias = nnx.Param(jnp.zeros(self.out_shape)) if use_bias else nnx.data(None)

    def __call__(self, x: jax.Array | RowSparseTensor) -> jax.Array:
        """Maps x [*B, *in_shape] to [*B, *out_shape].

        Of very many inputs that are mostly 0, such as words, x may hold the others alone: p for
        each example, `RowSparseTensor(indices [n, p, r], values [n, p], B, in_shape)`, n = prod(B).
        """
        inputs: DenseInputs | SparseInputs
        if isinstance(x, RowSparseTensor):
            batch = x.out_shape
            if x.in_shape != self.in_shape or x.values.ndim != 2:
                raise ValueError(
                    f"x: got in_shape {x.in_shape} and {x.values.ndim} axes of values, want "
                    f"{self.in_shape} and 2"
                )
            inputs = SparseInputs.of(x)
        else:
            batch = x.shape[: check_input(x, self.in_shape)]
            size = math.prod(batch), math.prod(self.in_shape)
            inputs = DenseInputs(jnp.asarray(x).reshape(size))
        y = self._multiply(inputs)
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype).reshape(-1, 1)
        return y.T.reshape(*batch, *self.out_shape)

    def weight(self) -> SparseTensor | RowSparseTensor:
        """The sparse tensor W [*out_shape, *in_shape].

        Tuples as in the paper are sampled anew by every call; where deterministic, or without a
        sampler, it is that of evaluation.
        """
        tensor = RowSparseTensor if self.by_output else SparseTensor
        return tensor(*self._entries(), self.out_shape, self.in_shape)

    def _entries(self) -> tuple[jax.Array, jax.Array]:
        """Places int32 [*chunks, n, r] and values [*chunks, n]."""
        tuples = self.tuples
        if isinstance(tuples, FixedTuples):
            return tuples.indices(), tuples.values[...]
        assert self.sampler is not None
        # By name: `nnx.tabulate` takes no dataclass by position.
        return self.sampler(tuples=tuples(), shape=tuples.shape, implementation=self.implementation)

    def _multiply(self, x: DenseInputs | SparseInputs) -> jax.Array:
        """Maps n inputs to [o, n]; the batch is the last axis: a weight reads a whole row."""
        in_shape, num_rows = self.in_shape, math.prod(self.out_shape)
        operation = "ell_spmm" if self.by_output else "spmm"
        implementation = kernels.serving(self.implementation, operation)
        tuples = self.tuples
        places, values = self._entries()
        columns, inputs = x.read(ravel(places[..., -len(in_shape) :], in_shape))
        values = values.astype(inputs.dtype)
        if self.by_output:
            y = kernels.ell_spmm(columns, values, inputs, implementation=implementation)
            propose = functools.partial(_propose_by_output, in_shape, implementation)
        else:
            rows = ravel(places[..., : -len(in_shape)], self.out_shape)
            y = kernels.spmm(
                rows, columns, values, inputs, num_rows=num_rows, implementation=implementation
            )
            propose = functools.partial(_propose, self.out_shape, in_shape, implementation)
        if isinstance(tuples, PlacedTuples):
            return explore(propose, tuples, x, y)
        return y


def _propose_by_output(in_shape, implementation, key, places, x, dy):
    """Candidates int32 [o, c, r] for every output, likely good ones, and their gradients.

    Half of them are the inputs that matter most to all outputs together, and half are drawn.
    """
    rows, c = dy.shape[0], num_candidates(places.shape[-2])
    num_top = min(c // 2, x.num_candidates)
    chance, signs = chances(key, (rows, c - num_top), (SUMS, rows))
    importance = x.column_norms(signs, dy)
    top = jax.lax.top_k(importance, num_top)[1].astype(jnp.int32)
    columns = x.names(jnp.concatenate([top, draw(chance, importance).ravel()]))
    read, inputs = x.read(columns)

    def of_rows(array):
        shared = jnp.broadcast_to(array[:num_top], (rows, num_top))
        return jnp.concatenate([shared, array[num_top:].reshape(rows, -1)], -1)

    gradients = kernels.ell_sddmm(of_rows(read), dy, inputs, implementation=implementation)
    return unravel(of_rows(columns), in_shape), gradients


def _propose(out_shape, in_shape, implementation, key, places, x, dy):
    """Candidates int32 [c, R] anywhere, likely good ones, and their gradients."""
    sizes, c = (dy.shape[0], x.num_candidates), num_candidates(places.shape[-2])
    chance, *signs = chances(key, (2, c), *((SUMS, size) for size in sizes))
    rows = draw(chance[0], x.row_norms(signs[1], dy))
    columns = x.names(draw(chance[1], x.column_norms(signs[0], dy)))
    candidates = jnp.concatenate([unravel(rows, out_shape), unravel(columns, in_shape)], -1)
    read, inputs = x.read(columns)
    return candidates, kernels.sddmm(rows, read, dy, inputs, implementation=implementation)
