"""Sorting numbers made of digits: our quicksort against the relaxed sorts of others.

All methods score images with the same network, on the same data, steps and seeds. They learn from
the sorted images alone (`images`), or from the right permutation (`permutation`); the test score is
that of the step at which validation was best. A method may be given several temperatures; the best
on validation counts. Every finished case is a line of `--out`, and is not run again.

  python -m benchmarks.sort                                                   # minutes
  python -m benchmarks.sort --protocol=mnist4 --data_dir=DIR --steps=100000   # the literature's

`mnist4` is that of NeuralSort and its successors: four digits side by side, 28 x 112, and a network
that knows nothing of single digits. `digits` is the same in small, two digits of scikit-learn's.
"""

import dataclasses
import itertools
import json
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx

from benchmarks import command
from benchmarks.sort_baselines import BASELINES
from hyperlayer_jax import soft_quicksort
from train import data, loop, sort

_MAX_LOSS = 12.0


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What is sorted, and by what network."""

    dataset: data.Name
    digits: int
    channels: tuple[int, int]
    sets: int
    sizes: tuple[int, ...]
    steps: int
    tested: int


PROTOCOLS = {
    "digits": Protocol("digits", 2, (8, 16), 32, (3, 5, 9), 300, 2000),
    "mnist4": Protocol("mnist", 4, (32, 64), 100, (3, 5, 7, 9, 15, 16, 32), 100_000, 2000),
}
# Our own: the proposal, and candidates.
OURS = {"ours": ("local", 8), "ours, as in the paper": ("uniform", 10)}
_CERTAINTY = 10.0


class Scorer(nnx.Module):
    """Two convolutions and two dense layers on the whole number, to a score."""

    def __init__(self, protocol: Protocol, side: int, *, rngs: nnx.Rngs):
        self.side, self.digits = side, protocol.digits
        first, second = protocol.channels
        self.convolutions = nnx.List(
            [nnx.Conv(i, o, (5, 5), rngs=rngs) for i, o in ((1, first), (first, second))]
        )
        flat = (side // 4) * (protocol.digits * side // 4) * second
        self.dense = nnx.List([nnx.Linear(flat, 64, rngs=rngs), nnx.Linear(64, 1, rngs=rngs)])

    def __call__(self, digits: jax.Array) -> jax.Array:
        """Maps digits float [..., digits, pixels] to scores [...]."""
        x = digits.reshape(-1, self.digits, self.side, self.side)
        x = jnp.swapaxes(x, 1, 2).reshape(-1, self.side, self.digits * self.side, 1)
        for layer in self.convolutions:
            x = nnx.max_pool(nnx.relu(layer(x)), (2, 2), (2, 2))
        x = nnx.relu(self.dense[0](x.reshape(len(x), -1)))
        return self.dense[1](x).reshape(digits.shape[:-2])


class Sorter(nnx.Module):
    """Holds a scorer, as `train.sort.evaluate` wants it."""

    def __init__(self, protocol: Protocol, side: int, *, rngs: nnx.Rngs):
        self.scorer = Scorer(protocol, side, rngs=rngs)


def buckets_of(items: jax.Array, level: int, bits: int) -> jax.Array:
    """Sums items [*B, s, d] over the buckets of a level; at every place that of its own."""
    bucket = np.arange(items.shape[-2]) >> (bits - level)
    same = (bucket[:, None] == bucket).astype(np.float32)
    return jnp.einsum("ij,...jd->...id", same, items)


def permutation_loss(levels: list[jax.Array], target: jax.Array) -> jax.Array:
    """The mean cross entropy of where items are, target [*B, s, s] the right permutation.

    Of relaxed sorts `levels` has the matrix alone. Of ours it has that of every level, which is
    asked for the bucket that an item belongs to.
    """
    bits = len(levels)
    losses = []
    for level, matrix in enumerate(levels, 1):
        share = (target * buckets_of(matrix, level, bits)).sum(-2)
        losses.append(-jnp.log(jnp.clip(share, np.exp(-_MAX_LOSS))).mean())
    return sum(losses) / bits


def loss_of(method, temperature, supervision, key, scores, x, numbers):
    """The loss of one method on sets of images x [b, s, pixels]."""
    size = scores.shape[-1]
    order = jnp.argsort(numbers, axis=-1)
    if supervision == "permutation":
        target = jax.nn.one_hot(order, size)
        x = jnp.broadcast_to(jnp.eye(size), target.shape)
    else:
        target = jnp.take_along_axis(x, order[..., None], -2)
    if method in OURS:
        proposal, num_samples = OURS[method]
        result = soft_quicksort(
            key,
            x,
            scores,
            num_samples=num_samples,
            certainty=1 / temperature,
            proposal=proposal,
        )
        if supervision == "permutation":
            return permutation_loss(list(result.items[1:]), target)
        return sort.sort_loss(result, target, "means")
    matrix = BASELINES[method][0](scores, temperature)
    if supervision == "permutation":
        return permutation_loss([matrix], target)
    return jnp.mean((matrix @ x - target) ** 2)


def run(case: dict, protocol: Protocol, dataset: data.Dataset, temperature: float) -> dict:
    """Trains and tests one method; its figures."""
    method, supervision, size = case["method"], case["supervision"], case["size"]
    config = sort.Config(
        seed=case["seed"],
        size=size,
        digits=protocol.digits,
        dataset=protocol.dataset,
        steps=case["steps"],
        batch_size=protocol.sets,
    )
    side = dataset.train.images.shape[1]
    model = Sorter(protocol, side, rngs=nnx.Rngs(config.seed))
    chosen = sort.fixed_sets(dataset.validation, config, min(500, protocol.tested))
    test_sets = sort.fixed_sets(dataset.test, config, protocol.tested)
    best = {"validation": -1.0}

    def loss_fn(model, key, split):
        keys = jax.random.split(key)
        images, numbers = sort.draw_sets(keys[0], split, config)
        flat = images.reshape(*images.shape[:3], -1)
        scores = model.scorer(flat)
        x = flat.reshape(*images.shape[:2], -1)
        loss = loss_of(method, temperature, supervision, keys[1], scores, x, numbers)
        return loss, {}

    def evaluate(model, step):
        figures = sort.evaluate(model, dataset.validation, chosen)
        if step and figures["exact_match"] > best["validation"]:
            best.update(sort.evaluate(model, dataset.test, test_sets))
            best.update(validation=figures["exact_match"], step=step)
        return {"validation_exact_match": figures["exact_match"]}

    with tempfile.TemporaryDirectory() as folder:
        trained = loop.train(
            model,
            optax.adam(case["learning_rate"]),
            loss_fn,
            dataset.train,
            config=config,
            key=jax.random.key(config.seed),
            steps=config.steps,
            workdir=pathlib.Path(folder),
            batch_size=config.batch_size,
            evaluate=evaluate,
            evaluate_every=max(50, config.steps // 20 // 50 * 50),
        )
    return {
        **case,
        "temperature": temperature,
        **best,
        "ms": 1e3 * trained.figures["train_seconds"] / config.steps,
    }


def table(results: list[dict]) -> str:
    """Rows of methods, columns of sizes: mean exact match over seeds, and its spread."""
    sizes = sorted({r["size"] for r in results})
    lines = [
        " | ".join(["| method, supervision", *(f"n = {n}" for n in sizes)]) + " |",
        "|---|" + "---|" * len(sizes),
    ]
    for label in dict.fromkeys((r["method"], r["supervision"]) for r in results):
        cells = []
        for n in sizes:
            found = [
                r["exact_match"]
                for r in results
                if (r["method"], r["supervision"], r["size"]) == (*label, n)
            ]
            spread = f" ({min(found):.3f}-{max(found):.3f})" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.3f}{spread}" if found else "")
        lines.append(f"| {', '.join(label)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def comparisons(results: list[dict]) -> Iterator[dict]:
    """Ours beside every other method of the same case."""
    for ours, rival in itertools.product(results, results):
        same = all(ours[name] == rival[name] for name in ("size", "supervision", "seed"))
        if ours["method"] == "ours" and rival["method"] != "ours" and same:
            yield {
                "name": f"sort {ours['size']} by {ours['supervision']}, a training step",
                "ms": ours["ms"],
                "rival": rival["method"],
                "rival_ms": rival["ms"],
                "speedup": rival["ms"] / ours["ms"],
                "max_difference": None,
                "exact_match": ours["exact_match"],
                "rival_exact_match": rival["exact_match"],
            }


def main(argv):
    del argv
    given = flags.FLAGS
    protocol = PROTOCOLS[given.protocol]
    try:
        dataset = data.load(protocol.dataset, given.data_dir)
    except data.DataError as error:
        sys.exit(" ".join(str(error).split()))
    out = command.check_file("out", given.out)
    done = (
        [json.loads(line) for line in out.read_text().splitlines()] if out and out.exists() else []
    )
    methods = given.methods or [*OURS, *(m for m in BASELINES if m != "ott-jax")]
    results = []
    for size in map(int, given.sizes or protocol.sizes):
        for method in methods:
            if method == "bitonic, Cauchy" and size & (size - 1):
                continue
            default = 1 / _CERTAINTY if method in OURS else BASELINES[method][1]
            for supervision in given.supervision:
                for seed in range(given.seeds):
                    case = {
                        "protocol": given.protocol,
                        "method": method,
                        "supervision": supervision,
                        "size": size,
                        "seed": seed,
                        "steps": given.steps or protocol.steps,
                        "learning_rate": given.learning_rate,
                        "factors": given.factors,
                    }
                    result = next((r for r in done if case.items() <= r.items()), None)
                    if result is None:
                        trials = [
                            run(case, protocol, dataset, default * float(factor))
                            for factor in given.factors
                        ]
                        result = max(trials, key=lambda trial: trial["validation"])
                        if out:
                            with out.open("a") as file:
                                file.write(json.dumps(result) + "\n")
                    results.append(result)
                    print(
                        f"n={size} {method}, {supervision}, seed {seed}: exact match "
                        f"{result['exact_match']:.4f}, {result['ms']:.1f} ms a step, "
                        f"temperature {result['temperature']:.3g}",
                        flush=True,
                    )
    print(table(results))
    print(json.dumps({"cases": list(comparisons(results))}))


if __name__ == "__main__":
    flags.DEFINE_enum("protocol", "digits", list(PROTOCOLS), "What is sorted.")
    flags.DEFINE_string("data_dir", None, "Folder of the four IDX files of MNIST.")
    command.define_numbers(
        "sizes", None, "Numbers in a set; by default those of the protocol.", kind=int, below=2**16
    )
    flags.DEFINE_multi_enum(
        "methods", None, [*OURS, *BASELINES], "What to train; by default all but ott-jax."
    )
    command.define_choices("supervision", ["images", "permutation"], "What is learned from.")
    command.define_numbers(
        "factors", [1], "Temperatures to try, times that of a method.", kind=float, below=1e6
    )
    flags.DEFINE_integer("steps", None, "Updates; by default those of the protocol.", lower_bound=1)
    flags.DEFINE_integer("seeds", 1, "Runs of each case.", lower_bound=1)
    flags.DEFINE_float("learning_rate", 1e-3, "Of Adam.", lower_bound=0.0)
    flags.DEFINE_string("out", None, "File of results, a line each, that a later run goes on from.")
    command.run(main)
