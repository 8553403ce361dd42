"""Ranks and the top k in a loss: regression whose training labels are partly wrong.

A fifth of the labels of the diabetes data (442 patients, bundled with scikit-learn) are replaced by
outliers. The same linear model is fitted by squared errors (the baseline), by ranks (their
correlation is Spearman's, which no outlier moves far), and without the k largest squared errors.

  python examples/soft_ranks.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.stats import spearmanr
from sklearn.datasets import load_diabetes
from sklearn.utils import shuffle

import hyperlayer_jax as hl


def squares(predicted, y):
    return jnp.mean((predicted - y) ** 2)


def ranks(predicted, y):
    soft = hl.soft_rank(predicted, certainty=10.0)
    return -jnp.corrcoef(soft, hl.soft_rank(y, num_samples=0))[0, 1]


def trimmed(predicted, y):
    errors = (predicted - y) ** 2
    largest = hl.soft_top_k(errors, len(y) // 4).mask
    return jnp.mean((1 - largest) * errors)


def main(steps: int = 500) -> dict[str, float]:
    """Fits each loss and returns Spearman's correlation on patients held out."""
    x, y = load_diabetes(return_X_y=True)
    rng = np.random.default_rng(0)
    x, y = shuffle(jnp.float32(x / x.std(0)), jnp.float32((y - y.mean()) / y.std()), random_state=0)
    labels = jnp.where(rng.random(300) < 0.2, 20 * rng.standard_normal(300), y[:300])
    optimizer, figures = optax.adam(0.01), {}
    for loss in (squares, ranks, trimmed):

        def step(state, key, loss=loss):
            (w, moments), batch = state, jax.random.choice(key, 300, (32,), replace=False)
            gradient = jax.grad(lambda w: loss(x[batch] @ w, labels[batch]))(w)
            updates, moments = optimizer.update(gradient, moments)
            return (optax.apply_updates(w, updates), moments), None

        start, keys = jnp.full(10, 0.01), jax.random.split(jax.random.key(0), steps)
        (w, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), keys)
        figures[loss.__name__] = round(float(spearmanr(x[300:] @ w, y[300:]).statistic), 3)
    print("Spearman's correlation on other patients:", figures)
    return figures


if __name__ == "__main__":
    main()
