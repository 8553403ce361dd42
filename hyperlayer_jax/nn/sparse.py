"""The sparse linear layer, and index tuples that are parameters."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from hyperlayer_jax import checks, kernels
from hyperlayer_jax.nn.candidates import SUMS, chances, draw, norms, num_candidates, unravel
from hyperlayer_jax.nn.hyperlayer import HyperLayer
from hyperlayer_jax.nn.jumping import PlacedTuples, explore
from hyperlayer_jax.tensors import ravel
from hyperlayer_jax.transforms import transform_means, transform_sigmas
from hyperlayer_jax.types import IndexTuples


class FreeTuples(nnx.Module):
    """Index tuples that are parameters: a hypernetwork that does not look at its input."""

    def __init__(
        self,
        chunks: Sequence[int],
        num_tuples: int,
        shape: Sequence[int],
        *,
        values: float | None = None,
        sigma_scale: float = 0.1,
        min_sigma: float = 0.0,
        rngs: nnx.Rngs,
    ):
        """Spreads the means at random over the index space.

        Args:
          chunks: the chunk axes of the tuples, () for a single chunk.
          num_tuples: k, the tuples in a chunk.
          shape: the r axes of the index space.
          values: the value of every tuple, fixed; learned, from a normal distribution, where None.
          sigma_scale: see `transform_sigmas`.
          min_sigma: the smallest sigma, in indices.
          rngs: the stream `params` draws the initial means and values.
        """
        self.shape = checks.check_shape("shape", shape)
        size = (*chunks, checks.check_count("num_tuples", num_tuples))
        start = jax.random.uniform(
            rngs.params(), (*size, len(self.shape)), minval=0.02, maxval=0.98
        )
        self.means = nnx.Param(jnp.log(start) - jnp.log1p(-start))
        self.sigmas = nnx.Param(jnp.zeros(size))
        self.values: nnx.Variable
        if values is None:
            self.values = nnx.Param(jax.random.normal(rngs.params(), size) * num_tuples**-0.5)
        else:
            self.values = nnx.Variable(jnp.full(size, values, jnp.float32))
        self.sigma_scale = sigma_scale
        self.min_sigma = min_sigma

    def __call__(self, x: jax.Array | None = None) -> IndexTuples:
        """Returns means and sigmas [*chunks, k, r] and values [*chunks, k], whatever x is."""
        return IndexTuples(
            transform_means(self.means[...], self.shape),
            transform_sigmas(
                self.sigmas[...], self.shape, scale=self.sigma_scale, minimum=self.min_sigma
            ),
            self.values[...],
        )


class SparseLinear(nnx.Module):
    """A linear layer that learns which of its weights exist: y = W x + b, W of few weights.

    The weights sit at integer places, so training computes what evaluation does, at the cost of
    the weights alone. An optimizer in `jumps` moves those of little use to where others would help:

        optimizer = jumps(key, model, optax.adam(1e-3), until=1500)
        optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)

    Without `jumps`, places stay as long as the optimizer leaves alone what has no gradient: weight
    decay would move them.

    With `num_global`, `num_local` or fixed `values` they are tuples as in the paper instead, which
    move by gradient: one W serves a whole batch, and is sampled anew at every call.
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
        num_global: int = 0,
        num_local: int = 0,
        region: int | Sequence[int] | None = None,
        use_bias: bool = False,
        implementation: str | None = None,
        deterministic: bool = False,
        rngs: nnx.Rngs,
    ):
        """Makes the layer.

        Args:
          in_shape: the axes of the input.
          out_shape: the axes of the output.
          num_tuples: the weights of W, or with `by_output` those of each output.
          by_output: gives every output `num_tuples` weights of its own, whose inputs are learned;
            otherwise both are.
          values: the value of every tuple, fixed; learned where None.
          sigma_scale: see `transform_sigmas`; this and what follows for tuples as in the paper.
          min_sigma: the smallest sigma, in indices.
          num_global: points per tuple drawn from the whole space.
          num_local: points per tuple drawn from the region.
          region: the axes of the region around a mean; needed when num_local > 0.
          use_bias: adds a learned [*out_shape], 0 at first.
          implementation: the kernel backend for what it serves, chosen by device where None.
          deterministic: looks for no better places, or rounds the means of tuples as in the paper;
            `nnx.view(model, deterministic=True)` for evaluation.
          rngs: the stream `params`, and `sample` for tuples as in the paper.

        Raises:
          ValueError: a shape is out of range, or there are more weights than places.
        """
        in_shape = (in_shape,) if isinstance(in_shape, int) else tuple(in_shape)
        out_shape = (out_shape,) if isinstance(out_shape, int) else tuple(out_shape)
        chunks = (math.prod(out_shape),) if by_output else ()
        space = in_shape if by_output else out_shape + in_shape
        tuples: PlacedTuples | FreeTuples
        if values is None and not num_global and not num_local:
            # As in a dense layer: outputs vary as inputs do.
            inputs = num_tuples if by_output else num_tuples / math.prod(out_shape)
            scale = max(inputs, 1) ** -0.5
            tuples = PlacedTuples(chunks, num_tuples, space, scale=scale, rngs=rngs)
        else:
            tuples = FreeTuples(
                chunks,
                num_tuples,
                space,
                values=values,
                sigma_scale=sigma_scale,
                min_sigma=min_sigma,
                rngs=rngs,
            )
        # The batch travels as the feature axis of an unbatched layer.
        self.layer = HyperLayer(
            tuples,
            out_shape,
            in_shape,
            template="output" if by_output else None,
            num_feature_axes=1,
            num_global=num_global,
            num_local=num_local,
            region=region,
            use_bias=use_bias,
            implementation=implementation,
            deterministic=deterministic,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [*B, *in_shape] to [*B, *out_shape]."""
        checks.check_float("x", x, len(self.layer.in_shape), "[*B, *in_shape]")
        x = jnp.asarray(x)
        batch = x.shape[: x.ndim - len(self.layer.in_shape)]
        if isinstance(self.layer.hypernetwork, PlacedTuples):
            y = self._multiply(x.reshape(math.prod(batch), math.prod(self.layer.in_shape)))
            return y.reshape(*batch, *self.layer.out_shape)
        features = jnp.moveaxis(x.reshape(math.prod(batch), *self.layer.in_shape), 0, -1)
        return jnp.moveaxis(self.layer(features), -1, 0).reshape(*batch, *self.layer.out_shape)

    def _multiply(self, x: jax.Array) -> jax.Array:
        """Maps x [n, i] to [n, o]."""
        layer, tuples = self.layer, self.layer.hypernetwork
        assert isinstance(tuples, PlacedTuples)
        in_shape, num_rows = layer.in_shape, math.prod(layer.out_shape)
        operation = "ell_spmm" if layer.by_output else "spmm"
        implementation = kernels.serving(layer.implementation, operation)
        places, values = tuples.indices(), tuples.values[...].astype(x.dtype)
        columns, inputs = _read(x, ravel(places[..., -len(in_shape) :], in_shape))
        if layer.by_output:
            y = kernels.ell_spmm(columns, values, inputs, implementation=implementation)
            propose = functools.partial(_propose_by_output, in_shape, implementation)
        else:
            rows = ravel(places[..., : -len(in_shape)], layer.out_shape)
            y = kernels.spmm(
                rows, columns, values, inputs, num_rows=num_rows, implementation=implementation
            )
            propose = functools.partial(_propose, layer.out_shape, in_shape, implementation)
        if not layer.deterministic:
            y = explore(propose, tuples, x, y)
        if layer.bias is not None:
            y = y + layer.bias[...].astype(y.dtype).reshape(num_rows, 1)
        return y.T


def _read(x, columns):
    """Columns int32 [...] of x [n, i] as rows of another array: which [...], and that array [*, n].

    A batch has to be turned for products with few weights; of a very wide one, only what is used.
    """
    if columns.size >= x.shape[1]:
        return columns, x.T
    used = jnp.take(x, columns.ravel(), axis=1).T
    return jnp.arange(columns.size, dtype=jnp.int32).reshape(columns.shape), used


def _propose_by_output(in_shape, implementation, key, places, x, dy):
    """Candidates int32 [o, c, r] for every output, likely good ones, and their gradients.

    Half of them are the inputs that matter most to all outputs together, and half are drawn.
    """
    rows, c = dy.shape[0], num_candidates(places.shape[-2])
    num_top = min(c // 2, x.shape[1])
    chance, signs = chances(key, (rows, c - num_top), (SUMS, rows))
    importance = norms(signs, x.T, dy)
    top = jax.lax.top_k(importance, num_top)[1].astype(jnp.int32)
    top = jnp.broadcast_to(top[None], (rows, num_top))
    columns = jnp.concatenate([top, draw(chance, importance)], -1)
    read, inputs = _read(x, columns)
    return unravel(columns, in_shape), kernels.ell_sddmm(
        read, dy, inputs, implementation=implementation
    )


def _propose(out_shape, in_shape, implementation, key, places, x, dy):
    """Candidates int32 [c, R] anywhere, likely good ones, and their gradients."""
    sizes, c = (dy.shape[0], x.shape[1]), num_candidates(places.shape[-2])
    chance, *signs = chances(key, (2, c), *((SUMS, size) for size in sizes))
    rows = draw(chance[0], norms(signs[1], dy, x.T))
    columns = draw(chance[1], norms(signs[0], x.T, dy))
    candidates = jnp.concatenate([unravel(rows, out_shape), unravel(columns, in_shape)], -1)
    read, inputs = _read(x, columns)
    return candidates, kernels.sddmm(rows, read, dy, inputs, implementation=implementation)
