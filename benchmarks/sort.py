"""Sorting numbers made of digits: our quicksort against the relaxed sorts of others.

All methods score images with the same network, on the same data, steps and seeds. They learn from
the sorted images alone (`images`), or from the right permutation (`permutation`); the test score is
that of the step at which most validation items were in place. A method may be given several
temperatures; the best on validation counts. All take steps in turns, and every turn is a line of
`--out`, so that a run that is cut off has compared them nevertheless; what is finished there is not
run again.

  python -m benchmarks.sort                                                   # minutes
  python -m benchmarks.sort --protocol=mnist4 --data_dir=DIR --steps=100000   # the literature's

`mnist4` is that of NeuralSort and its successors: four digits side by side, 28 x 112, and a network
that knows nothing of single digits. `digits` is the same in small: two digits of
scikit-learn's, and dense layers.
"""

import dataclasses
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from flax import nnx

from benchmarks import command
from benchmarks.sort_baselines import BASELINES
from hyperlayer_jax import soft_quicksort
from train import data, sort, updates

_MAX_LOSS = 12.0


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What is sorted, and by what network."""

    dataset: data.Name
    digits: int
    channels: tuple[int, ...]
    dense: tuple[int, ...]
    sets: int
    sizes: tuple[int, ...]
    steps: int
    tested: int


PROTOCOLS = {
    "digits": Protocol("digits", 2, (), (256, 64), 32, (5, 9, 15, 32), 1000, 2000),
    "mnist4": Protocol("mnist", 4, (32, 64), (64,), 100, (3, 5, 7, 9, 15, 16, 32), 100_000, 2000),
}
# Our own: the proposal, candidates, and whether all levels are compared or the last.
OURS = {
    "ours": ("local", 8, "last"),
    "ours, all levels": ("local", 8, "all"),
    "ours, as in the paper": ("uniform", 10, "last"),
}
_TEMPERATURE = 0.3
_METHODS = ("ours", "NeuralSort", "SoftSort", "Sinkhorn", "odd-even, Cauchy", "LapSum")
_IMAGES_AT_ONCE = 4000


class Scorer(nnx.Module):
    """Convolutions, if any, and dense layers on the whole number, to a score."""

    def __init__(
        self, protocol: Protocol, side: int, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs
    ):
        self.side, self.digits = side, protocol.digits
        channels = (1, *protocol.channels)
        self.convolutions = nnx.List(
            [
                nnx.Conv(i, o, (5, 5), dtype=dtype, rngs=rngs)
                for i, o in itertools.pairwise(channels)
            ]
        )
        side >>= len(protocol.channels)
        widths = (protocol.digits * side**2 * channels[-1], *protocol.dense, 1)
        self.dense = nnx.List([nnx.Linear(i, o, rngs=rngs) for i, o in itertools.pairwise(widths)])

    def __call__(self, digits: jax.Array) -> jax.Array:
        """Maps digits float [..., digits, pixels] to scores [...]."""
        x = digits.reshape(-1, self.digits, self.side, self.side)
        x = jnp.swapaxes(x, 1, 2).reshape(-1, self.side, self.digits * self.side, 1)
        for layer in self.convolutions:
            x = layer(x)
            items, height, width, channels = x.shape
            x = x.reshape(items, height // 2, 2, width // 2, 2, channels)
            x = nnx.relu(x.max((2, 4)))
        x = x.reshape(len(x), -1).astype(jnp.float32)
        *hidden, last = self.dense
        for layer in hidden:
            x = nnx.relu(layer(x))
        return last(x).reshape(digits.shape[:-2])


def buckets_of(items: jax.Array, level: int, bits: int) -> jax.Array:
    """Sums items [*B, s, d] over the buckets of a level; at every place that of its own."""
    bucket = np.arange(items.shape[-2]) >> (bits - level)
    same = (bucket[:, None] == bucket).astype(np.float32)
    return jnp.einsum("ij,...jd->...id", same, items)


def permutation_loss(levels: Sequence[jax.Array], target: jax.Array) -> jax.Array:
    """The mean cross entropy of where items are, target [*B, s, s] the right permutation.

    Of `levels`, the last ones, the very last is asked for the place of an item, and those before
    for the bucket that it belongs to.
    """
    bits = (target.shape[-1] - 1).bit_length()
    losses = []
    for level, matrix in enumerate(levels, bits + 1 - len(levels)):
        share = (target * buckets_of(matrix, level, bits)).sum(-2)
        losses.append(-jnp.log(jnp.clip(share, np.exp(-_MAX_LOSS))).mean())
    return sum(losses) / len(levels)


def loss_of(method, supervision, x, order, key, scores, temperature):
    """The loss of one method on sets of items x [b, s, pixels] whose right order is given."""
    size = scores.shape[-1]
    if supervision == "permutation":
        target = jax.nn.one_hot(order, size)
        x = jnp.broadcast_to(jnp.eye(size), target.shape)
    else:
        target = jnp.take_along_axis(x, order[..., None], -2)
    if method in OURS:
        proposal, num_samples, compared = OURS[method]
        result = soft_quicksort(
            key,
            x,
            scores,
            num_samples=num_samples,
            certainty=1 / temperature,
            proposal=proposal,
        )
        if supervision == "permutation":
            return permutation_loss(
                result.items[1:] if compared == "all" else result.items[-1:], target
            )
        return sort.sort_loss(result, target, "means" if compared == "all" else "plain")
    matrix = BASELINES[method][0](scores, temperature)
    if supervision == "permutation":
        return permutation_loss([matrix], target)
    return jnp.mean((matrix @ x - target) ** 2)


class Data(NamedTuple):
    """What a step is taken on: digits, how they are learned from, and how softly."""

    split: data.Split
    branch: jax.Array
    temperature: jax.Array


class Task:
    """Sets of one size: whatever is trained on them shares one compilation."""

    def __init__(
        self,
        protocol: Protocol,
        dataset: data.Dataset,
        size: int,
        branches: Sequence[tuple[str, str]],
        learning_rate: float,
        dtype: jnp.dtype = jnp.float32,
    ):
        """Takes a method and what it learns from for each of `branches`."""
        self.protocol, self.branches = protocol, list(branches)
        self.config = sort.Config(
            size=size, digits=protocol.digits, dataset=protocol.dataset, batch_size=protocol.sets
        )
        self.make_model = functools.partial(
            Scorer, protocol, dataset.train.images.shape[1], dtype=dtype
        )
        self.optimizer = optax.adam(learning_rate)
        self.train_split = jax.device_put(dataset.train)
        self.held_out = {
            name: (jax.device_put(split), sort.fixed_sets(split, self.config, count))
            for name, split, count in (
                ("validation", dataset.validation, min(1000, protocol.tested)),
                ("test", dataset.test, protocol.tested),
            )
        }
        self.graphdef = nnx.graphdef(self.make_model(rngs=nnx.Rngs(0)))
        self.updates = jax.jit(
            updates.make_updates(self.graphdef, self.optimizer, self._loss, None), donate_argnums=0
        )
        self._scores = jax.jit(self._score)

    def _loss(self, model, key, given):
        draw_key, sort_key = jax.random.split(key)
        images, numbers = sort.draw_sets(draw_key, given.split, self.config)
        flat = images.reshape(*images.shape[:3], -1)
        scores = model(flat)
        x = flat.reshape(*images.shape[:2], -1)
        order = jnp.argsort(numbers, axis=-1)
        # Differentiated within the branch, which so leaves nothing behind but this gradient.
        runs = [
            jax.value_and_grad(functools.partial(loss_of, *branch, x, order, sort_key))
            for branch in self.branches
        ]
        fixed = jax.lax.stop_gradient(scores)
        loss, slope = jax.lax.switch(given.branch, runs, fixed, given.temperature)
        return loss + (slope * (scores - fixed)).sum(), {}

    def _score(self, params, images, chosen):
        model = nnx.merge(self.graphdef, params)
        flat = images.reshape(len(images), -1)
        at_once = max(1, _IMAGES_AT_ONCE // chosen[0].size)
        return jax.lax.map(lambda sets: model(flat[sets]), chosen, batch_size=at_once)

    def start(self, seed: int) -> updates.State:
        """The state of a run before its first step."""
        params = nnx.state(self.make_model(rngs=nnx.Rngs(seed)), nnx.Param)
        step = jnp.zeros((), jnp.int32)
        return updates.State(step, params, nnx.State({}), self.optimizer.init(params), None)

    def test(self, params: nnx.State, name: str) -> tuple[float, float]:
        """How many held-out sets are in order, and how many items in their places."""
        split, chosen = self.held_out[name]
        scores = np.asarray(self._scores(params, split.images, chosen))
        return sort.matches(scores, np.asarray(split.labels)[chosen])


@dataclasses.dataclass
class Trial:
    """A method that learns at one temperature."""

    task: Task
    case: dict
    temperature: float
    state: updates.State
    seconds: float = 0.0
    best: dict = dataclasses.field(default_factory=lambda: {"validation": -1.0})

    def advance(self, stop: int) -> dict | None:
        """Trains up to a step; its figures, or None where they are no longer finite."""
        began, before = time.perf_counter(), int(self.state.step)
        branch = self.task.branches.index((self.case["method"], self.case["supervision"]))
        given = Data(self.task.train_split, np.int32(branch), np.float32(self.temperature))
        key = jax.random.key(self.case["seed"])
        self.state, _, _, finite = self.task.updates(self.state, np.int32(stop), key, given)
        if not np.asarray(finite).all():
            return None
        ms = 1e3 * (time.perf_counter() - began) / (stop - before)
        # Of items in place: where sets are large, hardly any is right as a whole.
        exact_now, validation = self.task.test(self.state.params, "validation")
        if validation > self.best["validation"]:
            exact, each = self.task.test(self.state.params, "test")
            self.best = {"validation": validation, "best_step": stop}
            self.best |= {"exact_match": exact, "element_wise": each}
        return {
            **self.case,
            "temperature": self.temperature,
            **self.best,
            "validation_now": validation,
            "validation_exact_now": exact_now,
            "step": stop,
            "ms": ms,
        }


def train(task: Task, cases: list[dict], steps: int) -> Iterator[dict]:
    """Trains all cases in turns, so that they are comparable whenever that ends; their figures."""
    trials = []
    for case in cases:
        default = _TEMPERATURE if case["method"] in OURS else BASELINES[case["method"]][1]
        trials += [
            Trial(task, case, default * factor, task.start(case["seed"]))
            for factor in case["factors"]
        ]
    turn = max(50, steps // 20 // 50 * 50)
    for stop in [*range(turn, steps, turn), steps]:
        for trial in list(trials):
            figures = trial.advance(stop)
            if figures is None:
                trials.remove(trial)
                print(f"not finite by step {stop}: {trial.case}, {trial.temperature}", flush=True)
            else:
                yield figures


def table(results: list[dict], figure: str) -> str:
    """Rows of methods, columns of sizes: the mean of a figure over seeds, and its spread."""
    sizes = sorted({r["size"] for r in results})
    lines = [
        " | ".join([f"| {figure}", *(f"n = {n}" for n in sizes)]) + " |",
        "|---|" + "---|" * len(sizes),
    ]
    for label in dict.fromkeys((r["method"], r["supervision"]) for r in results):
        cells = []
        for n in sizes:
            found = [
                r[figure]
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


def chosen(results: list[dict]) -> list[dict]:
    """Of the figures of every trial the last, and of the trials of a case the best."""
    last = {}
    for result in results:
        case = (result[name] for name in ("size", "method", "supervision", "seed"))
        last.setdefault(tuple(case), {})[result["temperature"]] = result
    return [max(trials.values(), key=lambda r: r["validation"]) for trials in last.values()]


def _read(out):
    """The figures in a file of an earlier run."""
    try:
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        return [line for line in lines if line["step"]]
    except (ValueError, KeyError, TypeError) as error:
        raise app.UsageError(f"--out: {out} has lines that are no results: {error}") from error


def main(argv):
    del argv
    given = flags.FLAGS
    protocol = PROTOCOLS[given.protocol]
    try:
        dataset = data.load(protocol.dataset, given.data_dir)
    except data.DataError as error:
        sys.exit(" ".join(str(error).split()))
    out = command.check_file("out", given.out)
    done = _read(out) if out and out.exists() else []
    steps = given.steps or protocol.steps
    methods = given.methods or _METHODS
    results = []
    for size in map(int, given.sizes or protocol.sizes):
        fit = [m for m in methods if m != "bitonic, Cauchy" or not size & (size - 1)]
        branches = [(m, s) for s in given.supervision for m in fit]
        cases = [
            {
                "protocol": given.protocol,
                "method": method,
                "supervision": supervision,
                "size": size,
                "seed": seed,
                "learning_rate": given.learning_rate,
                "dtype": given.dtype,
                "factors": [float(factor) for factor in given.factors],
            }
            for seed in range(given.seeds)
            for method, supervision in branches
        ]
        before = [r for r in done if r["step"] == steps]
        ran = [[r for r in before if case.items() <= r.items()] for case in cases]
        results += itertools.chain.from_iterable(ran)
        cases = [c for c, found in zip(cases, ran, strict=True) if len(found) < len(given.factors)]
        if not cases:
            continue
        task = Task(protocol, dataset, size, branches, given.learning_rate, jnp.dtype(given.dtype))
        for figures in train(task, cases, steps):
            results.append(figures)
            if out:
                with out.open("a") as file:
                    file.write(json.dumps(figures) + "\n")
            print(
                f"n={size} {figures['method']}, {figures['supervision']}, seed {figures['seed']}, "
                f"temperature {figures['temperature']:.3g}, step {figures['step']}: exact match "
                f"{figures['exact_match']:.4f}, {figures['ms']:.2f} ms a step",
                flush=True,
            )
    results = chosen(results)
    for figure in ("exact_match", "element_wise"):
        print(table(results, figure))
    print(json.dumps({"cases": list(comparisons(results))}))


if __name__ == "__main__":
    flags.DEFINE_enum("protocol", "digits", list(PROTOCOLS), "What is sorted.")
    flags.DEFINE_string("data_dir", None, "Folder of the four IDX files of MNIST.")
    command.define_numbers(
        "sizes", None, "Numbers in a set; by default those of the protocol.", kind=int, below=2**16
    )
    flags.DEFINE_multi_enum(
        "methods", None, [*OURS, *BASELINES], f"What to train; by default {_METHODS}."
    )
    command.define_choices("supervision", ["images", "permutation"], "What is learned from.")
    command.define_numbers(
        "factors", [1], "Temperatures to try, times that of a method.", kind=float, below=1e6
    )
    flags.DEFINE_integer("steps", None, "Updates; by default those of the protocol.", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the convolutions.")
    flags.DEFINE_integer("seeds", 1, "Runs of each case.", lower_bound=1)
    flags.DEFINE_float("learning_rate", 1e-3, "Of Adam.", lower_bound=0.0)
    flags.DEFINE_string("out", None, "File of results, a line each, that a later run goes on from.")
    command.run(main)
