"""What glimpses are compared with: bilinear reading, and places that a policy draws."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hyperlayer_jax import checks
from hyperlayer_jax.grids import bilinear, box_means
from hyperlayer_jax.nn.glimpse import Aim, Glimpses, check_inputs, read, rows_of, small_linear
from hyperlayer_jax.nn.sampler import stream
from hyperlayer_jax.sampling import round_means


class SpatialTransformer(nnx.Module):
    """Reads glimpses by bilinear interpolation on an affine grid (Jaderberg et al., 1506.02025)."""

    def __init__(
        self,
        num_features: int,
        glimpse_shape: Sequence[int],
        num_glimpses: int,
        *,
        initial_size: float = 0.75,
        rngs: nnx.Rngs,
    ):
        """Makes the layer.

        Args:
          num_features: F, of the features that decide.
          glimpse_shape: rows and columns of a glimpse.
          num_glimpses: g.
          initial_size: in (0, 1), the part of each axis that the first glimpse covers at the start,
            centred; the others cover less, down to half of it.
          rngs: the stream `params`.

        Raises:
          ValueError: an argument is out of range.
        """
        self.aim = Aim(
            num_features,
            glimpse_shape,
            num_glimpses,
            shape="affine",
            initial_size=initial_size,
            rngs=rngs,
        )

    def __call__(self, images: jax.Array, features: jax.Array) -> Glimpses:
        """Reads images [*B, H, W, C] where features [*B, F] say."""
        means, _ = self.aim(images, features)
        indices, values = bilinear(rows_of(means), images.shape[-3:-1])
        return Glimpses(
            read(images, indices, values, means),
            means,
            _no_sigmas(means),
        )


class ReinforceGlimpses(nnx.Module):
    """Reads glimpses of fixed size at places that a Gaussian policy draws (Mnih et al., 1406.6247).

    Reading gives no gradient to the places: they learn from `reinforce_loss`. Deterministic, they
    are the means of the policy.
    """

    def __init__(
        self,
        num_features: int,
        glimpse_shape: Sequence[int],
        num_glimpses: int,
        *,
        policy_sigma: float = 0.2,
        deterministic: bool = False,
        rngs: nnx.Rngs,
    ):
        """Makes the layer.

        Args:
          num_features: F, of the features that decide.
          glimpse_shape: rows and columns of a glimpse.
          num_glimpses: g.
          policy_sigma: > 0, of the Gaussian around every centre, in raw numbers (tanh of them is
            a position).
          deterministic: looks at the means; `nnx.view(model, deterministic=True)` for evaluation.
          rngs: the streams `params` and `sample`.

        Raises:
          ValueError: an argument is out of range.
        """
        if not policy_sigma > 0:
            raise ValueError(f"policy_sigma: got {policy_sigma}, want > 0")
        self.glimpse_shape = checks.check_shape("glimpse_shape", glimpse_shape, 2)
        self.num_glimpses = checks.check_positive("num_glimpses", num_glimpses)
        self.policy_sigma = policy_sigma
        self.deterministic = deterministic
        self.policy = small_linear(num_features, num_glimpses * 2, rngs)
        self.baseline = nnx.Linear(num_features, 1, rngs=rngs)
        self.rngs = stream(rngs, "sample")

    def __call__(self, images: jax.Array, features: jax.Array) -> Glimpses:
        """Reads images [*B, H, W, C] at full resolution, where features [*B, F] say."""
        check_inputs(images, features, self.policy.in_features)
        means = self.policy(features.astype(jnp.float32))
        drawn, log_prob, baseline = means, None, None
        if not self.deterministic:
            noise = jax.random.normal(self.rngs(), means.shape)
            drawn = jax.lax.stop_gradient(means + self.policy_sigma * noise)
            log_prob = -(((drawn - means) / self.policy_sigma) ** 2).sum(-1) / 2
            baseline = self.baseline(jax.lax.stop_gradient(features.astype(jnp.float32)))[..., 0]
        centres = jnp.tanh(drawn).reshape(*drawn.shape[:-1], self.num_glimpses, 2)
        shape = images.shape[-3:-1]
        half = [(n - 1) / max(s - 1, 1) for n, s in zip(self.glimpse_shape, shape, strict=True)]
        sizes = jnp.broadcast_to(np.asarray(half, np.float32), centres.shape)
        means = box_means(jnp.concatenate([centres, sizes], -1), self.glimpse_shape, shape)
        indices = round_means(rows_of(means), shape)[..., None, :]
        values = jnp.ones(indices.shape[:-1], means.dtype)
        patches = read(images, indices, values, means)
        return Glimpses(
            patches,
            means,
            _no_sigmas(means),
            log_prob=log_prob,
            baseline=baseline,
        )

    def set_view(self, *, deterministic: bool | None = None):
        """Called by `nnx.view`.

        Args:
          deterministic: looks at the means of the policy.
        """
        if deterministic is not None:
            self.deterministic = deterministic


def reinforce_loss(glimpses: Glimpses, reward: jax.Array) -> jax.Array:
    """The loss whose gradient is that of the expected reward, less a learned baseline.

    Args:
      glimpses: from `ReinforceGlimpses` in training.
      reward: float [*B], as large as the glimpses were good. No gradient flows into it.

    Returns:
      A scalar to add to the loss: the score-function estimate (REINFORCE) and the squared error of
      the baseline, both means over the batch.

    Raises:
      ValueError: the glimpses are those of a deterministic view, which have no chances, or the
        reward has the wrong shape.
    """
    if glimpses.log_prob is None or glimpses.baseline is None:
        raise ValueError("glimpses: got those of a deterministic view, want those of training")
    if jnp.shape(reward) != glimpses.log_prob.shape:
        raise ValueError(
            f"reward: got shape {jnp.shape(reward)}, want one for each image, "
            f"{glimpses.log_prob.shape}"
        )
    advantage = jax.lax.stop_gradient(reward) - glimpses.baseline
    policy_loss = -(glimpses.log_prob * jax.lax.stop_gradient(advantage)).mean()
    return policy_loss + (advantage**2).mean()


def _no_sigmas(means):
    return jnp.zeros((*means.shape[:-3], 2), means.dtype)
