"""Ways to look, side by side: runs of train.glimpse at equal steps, all seeds of one at once.

  python -m benchmarks.finding --seeds=3 model=find "model=topk candidates=4"

Each argument has the flags of one run of `train.glimpse`, and is trained as that would: the same
draws by the same keys, in one compiled loop with an axis of seeds. The next is compiled while one
trains. Errors are those of averaged parameters, on validation canvases on the way and on test
canvases at the end; where there are candidates, on validation canvases also with other numbers.
"""

import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from flax import nnx

from benchmarks import command
from train import canvases, data, evaluation, glimpse, updates
from train.config import FlagError, make, parse

_EVALUATIONS = 6
_AT_A_TIME = 2
_AT_ONCE = 500
_SCENES_AT_ONCE = 50
_PIXELS_AT_ONCE = 2**22
# Of one configuration: the others go on.
_FAILURES = data.DataError, FlagError, FloatingPointError, jax.errors.JaxRuntimeError


class Contest:
    """All seeds of one configuration."""

    def __init__(self, name: str, seeds: int):
        self.name, self.config = name, _config(name)
        self.dataset = glimpse.load(self.config)
        every = [dataclasses.replace(self.config, seed=self.config.seed + i) for i in range(seeds)]
        keys = jnp.stack([jax.random.split(jax.random.key(config.seed), 4) for config in every])
        self.keys = {"train": keys[:, 0], "validation": keys[:, 1], "test": keys[:, 3]}
        schedule = updates.warmup_cosine(self.config.learning_rate, self.config.steps, warmup=500)
        self.optimizer = optax.adam(schedule)
        with _on_host():
            states = [self._initial(config) for config in every]
            self.state = jax.tree.map(lambda *x: jnp.stack(x), *states)
        self.state = jax.device_put(self.state, jax.devices()[0])

    def _initial(self, config):
        model = glimpse.make_model(config, self.dataset.train.images.shape[-1])
        model = glimpse.begin(model, config)
        self.graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        optimizer = self.optimizer.init(params)
        return updates.State(jnp.zeros((), jnp.int32), params, rest, optimizer, params)

    def compile(self):
        """Compiles the loop."""
        began = time.perf_counter()
        loss_fn = functools.partial(glimpse.loss_fn, self.config)
        step = updates.make_updates(self.graphdef, self.optimizer, loss_fn, self.config.average)
        seeds = jax.jit(jax.vmap(step, in_axes=(0, None, 0, None)), donate_argnums=0)
        train = jax.device_put(self.dataset.train)
        compiled = seeds.lower(self.state, np.int32(0), self.keys["train"], train).compile()
        self.advance = lambda stop: compiled(self.state, stop, self.keys["train"], train)
        self.compile_seconds = time.perf_counter() - began

    def compile_evaluation(self):
        """Compiles what evaluates, beside the loop."""
        size = self.config.size
        self.validate, self.test = (self.evaluator(x, size) for x in ("validation", "test"))

    def train(self, stop: int) -> float:
        """Trains up to a step; the seconds that this took."""
        began = time.perf_counter()
        self.state, _, _, finite = self.advance(np.int32(stop))
        if not np.all(jax.device_get(finite)):
            raise FloatingPointError(f"{self.name}: not finite before step {stop}")
        return time.perf_counter() - began

    def evaluator(self, split: str, size: canvases.Size, **view: int) -> Callable[[], list[float]]:
        """Compiles what returns the error of each seed as the model is then."""
        digits = getattr(self.dataset, split)
        count, at_once = len(digits.labels), _SCENES_AT_ONCE
        if self.config.task == "digit":
            want = canvases.MIN_CANVASES if split == "test" else glimpse.NUM_VALIDATION
            count *= math.ceil(want / count)
            at_once = min(_AT_ONCE, max(1, _PIXELS_AT_ONCE // size.canvas**2))
        # Parts are of one size: a few canvases less than there might be.
        parts = math.ceil(count / at_once)
        numbers = np.arange(count - count % parts, dtype=np.int32) % len(digits.labels)
        rest = self.keys[split], jax.device_put(digits), numbers.reshape(parts, -1)
        states = self.state.average, self.state.rest
        wrong = functools.partial(_wrong, self.graphdef, self.config, size, view)
        compiled = jax.jit(wrong).lower(states, *rest).compile()

        def errors():
            wrong = compiled((self.state.average, self.state.rest), *rest)
            return [round(float(x), 4) for x in wrong]

        return errors


def _on_host():
    """What is done op by op is done on the CPU: elsewhere each is compiled for seconds."""
    return jax.default_device(jax.local_devices(backend="cpu")[0])


def _config(name: str) -> glimpse.Config:
    try:
        given = [f"--{flag}" for flag in name.split()]
        return make(glimpse.Config, parse(glimpse.Config, ["", *given]).given)
    except FlagError as error:
        raise app.UsageError(f"{name}: {error}") from error


def _check(name, candidates):
    config = _config(name)
    cells = (config.canvas // config.coarseness) ** 2
    most = min(config.scored or cells, cells)
    if config.model in glimpse.CANDIDATES and max(candidates, default=0) > most:
        raise app.UsageError(f"--candidates: want at most the {most} cells of {name}")


def _wrong(graphdef, config, size, view, states, keys, split, numbers):
    """The part of canvases that each seed gets wrong; int32 [parts, n] of digits or scenes."""

    def of_seed(states, key):
        model = evaluation.deterministic(nnx.merge(graphdef, *states))
        model = nnx.view(model, raise_if_not_found=False, **view)

        def of_part(part):
            i, chosen = part
            if config.task == "megapixel":
                logits, _ = model.look(*split.pick(chosen))
            else:
                key_of_part = jax.random.fold_in(key, i)
                logits, _ = model(canvases.draw(config, key_of_part, split, chosen, size=size))
            return (logits.argmax(-1) != split.labels[chosen]).mean()

        return jax.lax.map(of_part, (np.arange(len(numbers), dtype=np.int32), numbers)).mean()

    return jax.vmap(of_seed)(states, keys)


def run(contest: Contest) -> dict[str, Any]:
    """Trains all seeds; what came out."""
    steps, seconds, validation = contest.config.steps, 0.0, {}
    for i in range(1, _EVALUATIONS + 1):
        stop = math.ceil(i * steps / _EVALUATIONS)
        seconds += contest.train(stop)
        validation[stop] = contest.validate()
        print(f"{contest.name}: {stop} steps, {seconds:.1f} s, {validation[stop]}", flush=True)
    return {
        "name": contest.name,
        "device": jax.devices()[0].device_kind,
        "steps": steps,
        "train_seconds": round(seconds, 1),
        "compile_seconds": round(contest.compile_seconds, 1),
        "validation": validation,
        "error": contest.test(),
    }


def elsewhere(contest: Contest, candidates: list[int]) -> dict[str, Any]:
    """The same models on other canvases, and with other numbers of candidates."""
    config, figures = contest.config, {}
    if config.eval_canvas:
        figures["error_there"] = contest.evaluator("test", config.eval_size)()
    for n in candidates if config.model in glimpse.CANDIDATES else []:
        errors = contest.evaluator("validation", config.size, num_candidates=n)()
        figures[f"validation_with_{n}"] = errors
    return figures


def main(argv):
    values = flags.FLAGS
    names, candidates = argv[1:] or ["model=find"], [int(n) for n in values.candidates or []]
    for name in names:
        _check(name, candidates)
    contests: dict[Contest, dict[str, Any]] = {}
    with ThreadPoolExecutor(1) as makers, ThreadPoolExecutor(_AT_A_TIME) as compilers:

        def prepare(name):
            contest = Contest(name, values.seeds)
            work = contest.compile, contest.compile_evaluation
            return contest, [compilers.submit(compile) for compile in work]

        try:
            for future in [makers.submit(prepare, name) for name in names]:
                try:
                    contest, compiling = future.result()
                    for part in compiling:
                        part.result()
                    contests[contest] = run(contest)
                    print(json.dumps(contests[contest]), flush=True)
                except _FAILURES as error:
                    print(error, file=sys.stderr, flush=True)
        finally:
            # Where it is interrupted, only what has begun to be compiled is waited for.
            for pool in (makers, compilers):
                pool.shutdown(wait=False, cancel_futures=True)
    for contest, figures in contests.items():
        figures.update(elsewhere(contest, candidates))
        print(json.dumps(figures), flush=True)
    print(json.dumps({"cases": list(contests.values())}))
    if len(contests) < len(names):
        sys.exit(1)


if __name__ == "__main__":
    flags.DEFINE_integer("seeds", 3, "Of each run, beginning with its own.", lower_bound=1)
    command.define_numbers(
        "candidates",
        None,
        "How many are read in evaluation, besides as in training.",
        kind=int,
        below=2**10,
    )
    command.run(main, arguments=None)
