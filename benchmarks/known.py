"""Beds with a known answer: whether weights that jump find the few places that matter, exactly.

  python -m benchmarks.known

- taps: an image of noise is filtered with 5 taps in a field of 33 x 33; the student has 5.
- delays: a signal of noise is filtered with 3 delays of up to 1000 steps; the student has 3.
- needles: outputs are sums of 10 of very many inputs; each output of the student has 20 weights.
- words: the same where every example has 100 of the inputs alone, the 10 often among them.

A seed has solved its bed when all places are among the student's (of taps and delays, when they are
the student's), with the error that is left; also how many steps there were, and candidates drawn,
the mean milliseconds of a step, those with looks included, and the most memory of the process.
"""

import json
import resource
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx

from benchmarks import command
from hyperlayer_jax import RowSparseTensor
from hyperlayer_jax.nn import PlacedTuples, SparseConv, SparseLinear, jumps
from hyperlayer_jax.nn.candidates import num_candidates

_NEEDLES, _WEIGHTS, _STORED, _BATCH = 10, 20, 100, 64


class Bed(NamedTuple):
    """A student, what draws its inputs by key, their targets, and the places to be found."""

    student: nnx.Module
    draw: Callable[[jax.Array], Any]
    target: Callable[[Any], jax.Array]
    places: np.ndarray


def taps(seed: int) -> Bed:
    return _convolution(seed, 5, (33, 33), (8, 48, 48, 1))


def delays(seed: int) -> Bed:
    return _convolution(seed, 3, (1000,), (8, 1256, 1))


def _convolution(seed, count, field, shape):
    make = lambda seed: SparseConv(1, 1, count, field, padding="VALID", rngs=nnx.Rngs(seed))  # noqa: E731
    teacher = nnx.view(make(seed + 1000), deterministic=True)
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 1.0], (1, count))
    teacher.tuples.values[...] = jnp.asarray(signs * rng.uniform(0.3, 1, (1, count)), jnp.float32)
    # Places anywhere: those of a new layer are spread evenly.
    flat = rng.choice(np.prod(field), count, replace=False)
    places = np.stack([np.zeros(count, int), *np.unravel_index(flat, field)], -1)[None]
    teacher.tuples.places[...] = jnp.asarray(places, jnp.int32)
    return Bed(make(seed), lambda key: jax.random.normal(key, shape), teacher, places)


def needles(seed: int, num_inputs: int, num_outputs: int) -> Bed:
    def draw(key):
        # Signs: so many normal numbers would take longer than the step.
        words = jax.random.bits(key, (_BATCH, -(-num_inputs // 32)))
        bits = words[..., None] >> jnp.arange(32, dtype=jnp.uint32)[None, None] & 1
        return 2 * bits.reshape(_BATCH, -1)[:, :num_inputs].astype(jnp.float32) - 1

    found, weights, student, places = _needles(seed, num_inputs, num_outputs)
    return Bed(student, draw, lambda x: x[:, found] @ weights, places)


def words(seed: int, num_inputs: int, num_outputs: int) -> Bed:
    def draw(key):
        first, second, third = jax.random.split(key, 3)
        shape = (_BATCH, _STORED - _NEEDLES)
        others = jax.random.randint(first, shape, 0, num_inputs, jnp.int32)
        values = jax.random.normal(second, (_BATCH, _STORED))
        columns = jnp.concatenate([jnp.broadcast_to(found, (_BATCH, _NEEDLES)), others], -1)
        # Half of the ten are there, on average; what is absent has no place.
        there = jax.random.bernoulli(third, shape=columns.shape)
        there |= (jnp.arange(_STORED) >= _NEEDLES)[None]
        columns = jnp.where(there, columns, -1)
        return RowSparseTensor(columns[..., None], values, (_BATCH,), (num_inputs,))

    def target(x):
        known = x.indices == found[None, None]
        return (x.values[..., None] * known).sum(1) @ weights

    found, weights, student, places = _needles(seed, num_inputs, num_outputs)
    return Bed(student, draw, target, places)


def _needles(seed, num_inputs, num_outputs):
    rng = np.random.default_rng(seed)
    found = np.sort(rng.choice(num_inputs, _NEEDLES, replace=False))
    size = _NEEDLES, num_outputs
    weights = rng.choice([-1.0, 1.0], size) * rng.uniform(0.3, 1, size)
    rngs = nnx.Rngs(seed)
    student = SparseLinear(num_inputs, num_outputs, _WEIGHTS, by_output=True, rngs=rngs)
    places = np.broadcast_to(found[:, None], (num_outputs, _NEEDLES, 1))
    return jnp.asarray(found, jnp.int32), jnp.asarray(weights, jnp.float32), student, places


def run(bed: Bed, seed: int, *, steps: int, every: int) -> dict:
    """Trains the student of a bed; how many of the places it has found, and what that took."""
    model, draw, target, wanted = bed
    optimizer = optax.adam(optax.cosine_decay_schedule(0.03, steps))
    optimizer = jumps(
        jax.random.key(0), model, optimizer, until=int(0.9 * steps), every=every, fraction=0.5
    )
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def step(params, state, x):
        def loss(params):
            return ((nnx.merge(graphdef, params, rest, copy=True)(x) - target(x)) ** 2).mean()

        error, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, error

    step, draw = jax.jit(step, donate_argnums=(0, 1)), jax.jit(draw)
    state, seconds = optimizer.init(params), []
    for i in range(steps):
        x = jax.block_until_ready(draw(jax.random.fold_in(jax.random.key(seed), i)))
        began = time.perf_counter()
        params, state, error = jax.block_until_ready(step(params, state, x))
        seconds.append(time.perf_counter() - began)
        del x  # Before the next is drawn.
    model = nnx.merge(graphdef, params, rest)
    (tuples,) = (m for _, m in nnx.iter_modules(model) if isinstance(m, PlacedTuples))
    found = np.asarray(tuples.indices())
    there = (found[:, None] == wanted[:, :, None]).all(-1).any(-1)
    looks = len(range(every // 2, int(0.9 * steps), every))
    candidates = looks * found.shape[0] * num_candidates(found.shape[1])
    return {
        "found": int(there.sum()),
        "of": there.size,
        "error": float(error),
        "steps": steps,
        "candidates": candidates,
        "ms": 1e3 * float(np.mean(seconds[1:])),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def main(argv):
    del argv
    values, cases = flags.FLAGS, []
    sizes = values.inputs, values.outputs
    beds = {
        "taps": (taps, 3000, 6),
        "delays": (delays, 3000, 6),
        "needles": (lambda seed: needles(seed, *sizes), 300, 10),
        "words": (lambda seed: words(seed, *sizes), 300, 10),
    }
    for name in values.beds:
        make, steps, every = beds[name]
        for seed in range(values.seeds):
            result = run(make(seed), seed, steps=steps, every=every)
            cases.append({"name": f"{name}, seed {seed}", **result})
            print(cases[-1], flush=True)
    print(json.dumps({"cases": cases}))


if __name__ == "__main__":
    command.define_choices("beds", ["taps", "delays", "needles", "words"], "Which of them.")
    flags.DEFINE_integer("seeds", 5, "Of each bed.", lower_bound=1)
    flags.DEFINE_integer("inputs", 1_000_000, "Of the needles.", lower_bound=_WEIGHTS)
    flags.DEFINE_integer("outputs", 1000, "Of the needles.", lower_bound=1)
    command.run(main)
