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
    order = rng.permutation(len(x))
    x, y = jnp.float32(x[order] / x.std(0)), jnp.float32((y[order] - y.mean()) / y.std())
    labels = jnp.where(rng.random(300) < 0.2, 20 * rng.standard_normal(300), y[:300])
    figures = {}
    for loss in (squares, ranks, trimmed):
        optimizer = optax.adam(0.01)

        def objective(params, batch, loss=loss):
            return loss(x[batch] @ params["w"] + params["b"], labels[batch])

        def step(state, key, optimizer=optimizer, objective=objective):
            params, opt_state = state
            batch = jax.random.choice(key, 300, (32,), replace=False)
            updates, opt_state = optimizer.update(jax.grad(objective)(params, batch), opt_state)
            return (optax.apply_updates(params, updates), opt_state), None

        params = {"w": jnp.full(10, 0.01), "b": jnp.zeros(())}
        state, keys = (params, optimizer.init(params)), jax.random.split(jax.random.key(0), steps)
        (params, _), _ = jax.lax.scan(step, state, keys)
        figures[loss.__name__] = spearmanr(x[300:] @ params["w"], y[300:]).statistic
        print(f"{loss.__name__:8s} Spearman's correlation {figures[loss.__name__]:.3f}")
    return figures


if __name__ == "__main__":
    main()
