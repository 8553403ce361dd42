"""Time, memory and compilation of soft sorts, value and gradient, with and without items.

  python -m benchmarks.sort_speed --sizes=32,256,1024,65536

Memory and compilation are in the JSON alone.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks import command, report
from benchmarks.contenders import Contender
from benchmarks.sort_baselines import neural_sort, soft_sort
from benchmarks.timing import compare
from hyperlayer_jax import soft_quicksort

_SIZES = (32, 256, 1024)
# Sets of a size together have as many scores, and a matrix for each as many entries, at most.
_SETS = {"cpu": 8, "gpu": 64, "tpu": 64}
_SCORES, _ENTRIES = 1024, 1 << 26
# Of an item; without any, the scores are sorted.
_FEATURES = (0, 64)


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


def cases(small: bool = False, sizes: Sequence[int] = _SIZES) -> Iterator[dict[str, Any]]:
    """Yields the cases of all sizes, or of the first."""
    most = _SETS[jax.default_backend()]
    for size in sizes[: 1 if small else None]:
        sets = max(1, min(most, most * _SCORES // size))
        keys = jax.random.split(jax.random.key(0))
        scores = jax.random.normal(keys[0], (sets, size))
        for features in _FEATURES:
            x = [jax.random.normal(keys[1], (sets, size, features))] if features else []
            contenders = {
                name: _contender(sort, scores, *x).with_gradients()
                for name, sort in CONTENDERS.items()
                if name.startswith("ours") or sets * size**2 <= _ENTRIES
            }
            yield from compare(f"{sets} sets of {size}, {features} features", contenders)


def _contender(sort, scores, *x):
    def run(scores, *x):
        return sort(scores, *(x or (scores[..., None],)))

    return Contender(run, (scores, *x), tuple(range(1 + len(x))), same=sort is ours)


if __name__ == "__main__":
    command.define_numbers("sizes", list(_SIZES), "Scores in a set.", kind=int, below=2**31)
    report.main(sort_speed=lambda small: cases(small, [int(size) for size in flags.FLAGS.sizes]))
