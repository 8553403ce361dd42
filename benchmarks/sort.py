"""Sorting digits: our quicksort against the relaxed sorts that a user would otherwise pick.

All methods score images with the same network, on the same data, steps and seeds, and learn from
the pixels of the sorted images alone. NeuralSort (Grover et al., arXiv 1903.08850) and SoftSort
(Prillo and Eisenschlos, arXiv 2006.16038) are trained at several temperatures, and the best on
validation images counts. Takes a few minutes for each size:

  python -m benchmarks.sort --sizes=5,8,16
"""

import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from hyperlayer_jax import SoftSort
from train import data, sort

_TEMPERATURES = (0.03, 0.1, 0.3)


class RelaxedSort(nnx.Module):
    """Multiplies items by a row-stochastic matrix, a relaxed permutation."""

    def __init__(self, relax, temperature: float):
        self.relax = relax
        self.temperature = temperature

    def __call__(self, x: jax.Array, scores: jax.Array) -> SoftSort:
        """Sorts x [*B, s, d] by scores [*B, s], ascending."""
        matrix = self.relax(scores, self.temperature)
        return SoftSort((x, matrix @ x), (scores, (matrix @ scores[..., None])[..., 0]), ())


def soft_sort(scores, temperature):
    """SoftSort: row i is softmax(-|i-th smallest score - scores| / temperature)."""
    distance = jnp.abs(jnp.sort(scores, axis=-1)[..., :, None] - scores[..., None, :])
    return jax.nn.softmax(-distance / temperature, axis=-1)


def neural_sort(scores, temperature):
    """NeuralSort, ascending: row i is softmax(((2i - s - 1) scores - A 1) / temperature)."""
    size = scores.shape[-1]
    spread = jnp.abs(scores[..., :, None] - scores[..., None, :]).sum(-1)
    weight = 2 * np.arange(1, size + 1, dtype=np.float32) - size - 1
    logits = weight[:, None] * scores[..., None, :] - spread[..., None, :]
    return jax.nn.softmax(logits / temperature, axis=-1)


def run(config: sort.Config, dataset: data.Dataset, relax=None, temperature=None):
    """Trains one method; returns its test and run figures."""
    model = sort.Sorter(config, dataset.train.images[0].size, rngs=nnx.Rngs(config.seed))
    if relax is not None:
        model.quicksort = RelaxedSort(relax, temperature)
    with tempfile.TemporaryDirectory() as folder:
        model, figures = sort.train(model, dataset, config, pathlib.Path(folder))
    test_sets = sort.fixed_sets(dataset.test, config, 10_000)
    return sort.evaluate(model, dataset.test, test_sets) | figures


def main(argv):
    del argv
    dataset = data.load("digits")
    cases = []
    for size in map(int, flags.FLAGS.sizes):
        config = sort.Config(size=size, steps=flags.FLAGS.steps)
        ours = run(config, dataset)
        for name, relax in {"SoftSort": soft_sort, "NeuralSort": neural_sort}.items():
            trials = {t: run(config, dataset, relax, t) for t in _TEMPERATURES}
            best = max(trials, key=lambda t: trials[t]["validation_exact_match"])
            theirs = trials[best]
            ms, rival_ms = (1e3 * r["train_seconds"] / config.steps for r in (ours, theirs))
            cases.append(
                {
                    "name": f"sort {size} digits, a training step",
                    "ms": ms,
                    "rival": f"{name}, temperature {best}",
                    "rival_ms": rival_ms,
                    "speedup": rival_ms / ms,
                    "max_difference": None,
                    "exact_match": ours["exact_match"],
                    "rival_exact_match": theirs["exact_match"],
                }
            )
            print(
                f"size {size}: exact match {ours['exact_match']:.4f}, "
                f"{name} {theirs['exact_match']:.4f} (temperature {best}); "
                f"ms per step {ms:.2f}, {rival_ms:.2f}"
            )
    print(json.dumps({"cases": cases}))


if __name__ == "__main__":
    flags.DEFINE_list("sizes", ["5", "8", "16"], "Numbers in a set.")
    flags.DEFINE_integer("steps", 6000, "Updates of every method.", lower_bound=1)
    app.run(main)
