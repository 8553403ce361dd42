"""Time, memory and compilation of soft sorts, value and gradient, with and without items.

python -m benchmarks.sort_speed --sizes=32,256,1024,65536
"""

import json

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks import timing
from benchmarks.contenders import Contender
from benchmarks.sort_baselines import neural_sort, soft_sort
from hyperlayer_jax import soft_quicksort

# Sets of a size together have as many scores, and a matrix for each as many entries, at most.
_SCORES, _ENTRIES = 8 * 1024, 1 << 26


def ours(scores, x):
    """The last level alone."""
    return soft_quicksort(None, x, scores, num_samples=8, certainty=10.0).items[-1]


def levels(scores, x):
    """All levels."""
    result = soft_quicksort(None, x, scores, num_samples=8, certainty=10.0)
    return jnp.concatenate(result.items[1:], -1)


def by_matrix(relax):
    """The items that a relaxed permutation sorts."""
    return lambda scores, x: relax(scores, 0.1) @ x


CONTENDERS = {
    "ours": ours,
    "ours, all levels": levels,
    "NeuralSort": by_matrix(neural_sort),
    "SoftSort": by_matrix(soft_sort),
}


def main(argv):
    del argv
    cases = []
    for size in map(int, flags.FLAGS.sizes):
        sets = max(1, min(8, _SCORES // size))
        for features in map(int, flags.FLAGS.features):
            keys = jax.random.split(jax.random.key(0))
            scores = jax.random.normal(keys[0], (sets, size))
            # Without items, the scores are sorted.
            x = jax.random.normal(keys[1], (sets, size, features)) if features else None
            runs, spent = {}, {}
            for name, function in CONTENDERS.items():
                if not name.startswith("ours") and sets * size**2 > _ENTRIES:
                    continue

                def loss(scores, x, function=function):
                    return (function(scores, scores[..., None] if x is None else x) ** 2).mean()

                wanted = (0,) if x is None else (0, 1)
                contender = Contender(jax.value_and_grad(loss, wanted), (scores, x))
                runs[name], spent[name], _ = timing.prepare(contender)
            for name, seconds in timing.interleave(runs).items():
                cases.append(
                    {
                        "name": f"{name}: {sets} sets of {size}, {features} features",
                        "ms": 1e3 * seconds,
                        **spent[name],
                    }
                )
                print(
                    "{name}: {ms:.2f} ms, {temporary_mb:.1f} MB, compiled in "
                    "{compile_ms:.0f} ms".format(**cases[-1]),
                    flush=True,
                )
    print(json.dumps({"cases": cases}))


if __name__ == "__main__":
    flags.DEFINE_list("sizes", ["32", "256", "1024"], "Scores in a set.")
    flags.DEFINE_list("features", ["0", "64"], "Features of an item.")
    app.run(main)
