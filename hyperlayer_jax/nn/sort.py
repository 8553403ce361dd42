"""Differentiable quicksort as a module."""

import jax
from flax import nnx

from hyperlayer_jax.nn.sampler import stream
from hyperlayer_jax.sort import SoftSort, soft_quicksort


class SoftQuicksort(nnx.Module):
    """Sorts items by score: softly in training, exactly where deterministic."""

    def __init__(
        self,
        *,
        num_samples: int,
        certainty: float,
        proposal: str = "local",
        deterministic: bool = False,
        rngs: nnx.Rngs,
    ):
        """Makes the layer.

        Args:
          num_samples: partners of an item at a level; for "uniform" random splits of a bucket.
          certainty: > 0, how soon a difference in score decides.
          proposal: "local" or "uniform", see `soft_quicksort`.
          deterministic: sorts exactly; `nnx.view(model, deterministic=True)` for evaluation.
          rngs: the stream `sample` draws the splits of `proposal="uniform"`.
        """
        self.num_samples = num_samples
        self.certainty = certainty
        self.proposal = proposal
        self.deterministic = deterministic
        self.rngs = stream(rngs, "sample")

    def __call__(
        self, x: jax.Array, scores: jax.Array, lengths: jax.Array | None = None
    ) -> SoftSort:
        """Sorts x [*B, s, d] by scores [*B, s], ascending; of each set the first of `lengths`."""
        key = jax.random.key(0) if self.deterministic else self.rngs()
        return soft_quicksort(
            key,
            x,
            scores,
            num_samples=0 if self.deterministic else self.num_samples,
            certainty=self.certainty,
            proposal=self.proposal,
            lengths=lengths,
        )

    def set_view(self, *, deterministic: bool | None = None):
        """Called by `nnx.view`.

        Args:
          deterministic: sorts exactly.
        """
        if deterministic is not None:
            self.deterministic = deterministic
