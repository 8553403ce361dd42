"""Where modules draw points around index tuples, and what they do instead in evaluation."""

import typing
from collections.abc import Sequence
from typing import Literal

import jax
from flax import nnx

from hyperlayer_jax import checks
from hyperlayer_jax.hyperlayer import Predicate, discretize, round_tuples
from hyperlayer_jax.kernels import serving
from hyperlayer_jax.types import IndexTuples

Evaluation = Literal["fixed", "round"]


class Sampler(nnx.Module):
    """Turns index tuples into points and values.

    In training, points are drawn around the means, and the values of tuples redistributed over
    them (equations 4 to 6 of docs/method.md). Deterministic, nothing is drawn: "fixed" takes as
    many points at places that mean and sigma fix, "round" the nearest one alone.
    """

    def __init__(
        self,
        *,
        num_global: int = 2,
        num_local: int = 2,
        region: int | Sequence[int] | None = None,
        evaluation: Evaluation = "fixed",
        deterministic: bool = False,
        rngs: nnx.Rngs,
    ):
        """Makes the sampler.

        Args:
          num_global: points per tuple drawn from the whole space; "fixed", quantiles of its
            Gaussian.
          num_local: points per tuple drawn from its region; "fixed", spread evenly over it.
          region: the axes of the region around a mean; an eighth of each axis of the space, but at
            least 4 indices, where None.
          evaluation: "fixed" or "round", see the class.
          deterministic: draws nothing; for evaluation, `nnx.view(model, deterministic=True)`.
          rngs: the stream `sample`.

        Raises:
          ValueError: an argument is out of range, or rngs has neither `sample` nor a default.
        """
        self.num_global = checks.check_count("num_global", num_global)
        self.num_local = checks.check_count("num_local", num_local)
        if evaluation not in typing.get_args(Evaluation):
            raise ValueError(f'evaluation: got {evaluation!r}, want "fixed" or "round"')
        self.region = region
        self.evaluation: Evaluation = evaluation
        self.deterministic = deterministic
        self.rngs = stream(rngs, "sample")

    def __call__(
        self,
        tuples: IndexTuples,
        shape: Sequence[int],
        *,
        where: Predicate | None = None,
        implementation: str | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns points and values, as `discretize` or `round_tuples` does.

        Args:
          tuples: means and sigmas [*B, k, r], values [*B, k].
          shape: the r axes of the index space.
          where: a predicate, int32 [*B, m, r] -> bool [*B, m], of the points that are allowed.
          implementation: the kernel backend for what it serves, chosen by device where None.

        Raises:
          ValueError: an argument has the wrong shape, dtype or range.
        """
        if self.deterministic and self.evaluation == "round":
            return round_tuples(tuples, shape, where=where)
        shape = checks.check_shape("shape", shape)
        region = (
            tuple(min(s, max(4, s // 8)) for s in shape) if self.region is None else self.region
        )
        return discretize(
            None if self.deterministic else self.rngs(),
            tuples,
            shape,
            num_global=self.num_global,
            num_local=self.num_local,
            region=region,
            where=where,
            implementation=serving(implementation, "redistribute"),
        )

    def set_view(self, *, deterministic: bool | None = None):
        """Called by `nnx.view`.

        Args:
          deterministic: draws nothing.
        """
        if deterministic is not None:
            self.deterministic = deterministic


def stream(rngs: nnx.Rngs, name: str) -> nnx.RngStream:
    """A stream of random keys of a module's own.

    Args:
      rngs: has a stream of this name, or a default.
      name: of the stream.

    Raises:
      ValueError: rngs has neither.
    """
    try:
        return rngs[name].fork()
    except (AttributeError, KeyError) as error:
        raise ValueError(f"rngs: got no stream {name!r} and no default one") from error
