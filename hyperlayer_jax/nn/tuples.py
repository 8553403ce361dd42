"""Index tuples that do not depend on the input: fixed, free, and such as jump (docs/sparse.md)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hyperlayer_jax import checks
from hyperlayer_jax.hyperlayer import round_tuples
from hyperlayer_jax.nn.candidates import unravel
from hyperlayer_jax.transforms import transform_means, transform_sigmas
from hyperlayer_jax.types import IndexTuples


class FixedTuples(nnx.Module):
    """Index tuples at integer places that nothing moves; their values are parameters."""

    def __init__(self, places: jax.Array, values: jax.Array, shape: Sequence[int]):
        """Puts values [*chunks, k] at places int32 [*chunks, k, r] of an index space `shape`."""
        self.shape = checks.check_shape("shape", shape)
        self.places = nnx.Variable(places)
        self.values: nnx.Variable = nnx.Param(values)

    def __call__(self, x: jax.Array | None = None) -> IndexTuples:
        """Returns means [*chunks, k, r], sigmas of 0 and values [*chunks, k], whatever x is."""
        places = self.indices().astype(jnp.float32)
        return IndexTuples(places, jnp.zeros_like(places), self.values[...])

    def indices(self) -> jax.Array:
        """The places as int32 [*chunks, k, r]."""
        return self.places[...]

    def freeze(self) -> "FixedTuples":
        """The same places, from now on fixed, and values to train."""
        return FixedTuples(self.indices(), self.values[...], self.shape)


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

        Raises:
          ValueError: a shape or number is out of range.
        """
        self.shape = checks.check_shape("shape", shape)
        checks.check_sigmas(sigma_scale, min_sigma)
        size = (*chunks, checks.check_positive("num_tuples", num_tuples))
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
        return self.emit(self.means[...], self.sigmas[...], self.values[...])

    def emit(self, means: jax.Array, sigmas: jax.Array, values: jax.Array) -> IndexTuples:
        """Tuples from raw means [*B, k, r] and sigmas [*B, k], and values [*B, k]."""
        sigmas = transform_sigmas(
            sigmas, self.shape, scale=self.sigma_scale, minimum=self.min_sigma
        )
        return IndexTuples(transform_means(means, self.shape), sigmas, values)

    def freeze(self) -> FixedTuples:
        """Where the means round to, from now on fixed, and values to train."""
        return FixedTuples(*round_tuples(self(), self.shape), self.shape)


class PlacedTuples(FixedTuples):
    """Index tuples at integer places, from which only `jumps` moves them.

    Where tuples have jumped to are parameters, 0 before, in homogeneous coordinates: (w place, w).
    So no optimizer moves a place that has no gradient, weight decay included.
    """

    def __init__(
        self,
        chunks: Sequence[int],
        num_tuples: int,
        shape: Sequence[int],
        *,
        scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        """Spreads places evenly over the index space, all different, each at random in its part.

        Args:
          chunks: the chunk axes of the tuples, () for a single chunk.
          num_tuples: k, the tuples in a chunk.
          shape: the r axes of the index space.
          scale: the standard deviation of the first values.
          rngs: the stream `params`.

        Raises:
          ValueError: there are fewer places than tuples, or an axis is too long for float32.
        """
        shape = checks.check_shape("shape", shape)
        space = checks.check_size("shape", shape)
        count = checks.check_positive("num_tuples", num_tuples)
        if count > space:
            raise ValueError(f"num_tuples: got {count}, want at most {space}, one for each place")
        if max(shape) > checks.FLOAT32_MAX:
            raise ValueError(f"shape: got {shape}, want axes of at most {checks.FLOAT32_MAX}")
        size = (*chunks, count)
        edges = np.arange(count + 1, dtype=np.int64) * space // count
        first, last = (
            jnp.broadcast_to(jnp.asarray(e, jnp.int32), size) for e in (edges[:-1], edges[1:])
        )
        flat = jax.random.randint(rngs.params(), size, first, last, jnp.int32)
        values = jax.random.normal(rngs.params(), size) * scale
        super().__init__(unravel(flat, shape), values, shape)
        self.jumped = nnx.Param(jnp.zeros((*size, len(shape) + 1)))
        # Not 0 in steps in which better places are looked for: seeds.
        self.looks = nnx.Param(jnp.zeros(size))
        self.deterministic = False

    def indices(self) -> jax.Array:
        """The places as int32 [*chunks, k, r]."""
        jumped = jax.lax.stop_gradient(self.jumped[...])
        whole = jnp.round(jumped[..., :-1] / jnp.where(jumped[..., -1:] == 0, 1, jumped[..., -1:]))
        return jnp.where(jumped[..., -1:] == 0, self.places[...], whole.astype(jnp.int32))

    def set_view(self, *, deterministic: bool | None = None):
        """Called by `nnx.view`.

        Args:
          deterministic: looks for no better places.
        """
        if deterministic is not None:
            self.deterministic = deterministic


def freeze(model: Any) -> Any:
    """A copy of a model whose `SparseLinear`s and `SparseConv`s keep their weights where they are.

    Values stay parameters, to train on; any optimizer leaves the places alone. A `HyperLayer` stays
    what it is: where its weights are depends on its input.

    Args:
      model: a module that is or has such layers.

    Raises:
      ValueError: it has none.
    """
    model = nnx.clone(model)
    kinds = FixedTuples | FreeTuples
    layers = [
        m for _, m in nnx.iter_modules(model) if isinstance(getattr(m, "tuples", None), kinds)
    ]
    if not layers:
        raise ValueError("model: got no SparseLinear or SparseConv, want one at least")
    for layer in layers:
        layer.tuples = layer.tuples.freeze()  # type: ignore[attr-defined]
    return model
