"""Beds with a known answer: whether weights that jump find the few places that matter, exactly.

  python -m benchmarks.known

- taps: an image of noise is filtered with 5 taps in a field of 33 x 33; the student has 5.
- delays: a signal of noise is filtered with 3 delays of up to 1000 steps; the student has 3.
- needles: outputs are sums of 10 of very many inputs; each output of the student has 20 weights.

A seed has solved its bed when all places are among the student's (of taps and delays, when they are
the student's), with the error that is left; also how many steps there were, and candidates drawn.
"""

import json
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx

from benchmarks import command
from hyperlayer_jax.nn import PlacedTuples, SparseConv, SparseLinear, jumps
from hyperlayer_jax.nn.candidates import num_candidates

_NEEDLES, _WEIGHTS = 10, 20


def taps(seed: int):
    return _convolution(seed, 5, (33, 33), (8, 48, 48, 1))


def delays(seed: int):
    return _convolution(seed, 3, (1000,), (8, 1256, 1))


def _convolution(seed, count, field, shape):
    """A student, its target for x of a shape, and the places that it should find."""
    make = lambda seed: SparseConv(1, 1, count, field, padding="VALID", rngs=nnx.Rngs(seed))  # noqa: E731
    teacher = nnx.view(make(seed + 1000), deterministic=True)
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 1.0], (1, count))
    teacher.tuples.values[...] = jnp.asarray(signs * rng.uniform(0.3, 1, (1, count)), jnp.float32)
    # Places anywhere: those of a new layer are spread evenly.
    flat = rng.choice(np.prod(field), count, replace=False)
    places = np.stack([np.zeros(count, int), *np.unravel_index(flat, field)], -1)[None]
    teacher.tuples.places[...] = jnp.asarray(places, jnp.int32)
    return make(seed), teacher, shape, places


def needles(seed: int):
    num_inputs, num_outputs = flags.FLAGS.inputs, flags.FLAGS.outputs
    rng = np.random.default_rng(seed)
    found = rng.choice(num_inputs, _NEEDLES, replace=False)
    weights = rng.normal(size=(_NEEDLES, num_outputs)) / _NEEDLES**0.5
    weights = jnp.asarray(weights, jnp.float32)
    rngs = nnx.Rngs(seed)
    student = SparseLinear(num_inputs, num_outputs, _WEIGHTS, by_output=True, rngs=rngs)
    places = np.broadcast_to(found[:, None], (num_outputs, _NEEDLES, 1))
    return student, lambda x: x[:, found] @ weights, (64, num_inputs), places


def run(bed: Callable, seed: int, steps: int, every: int, rate: float) -> dict:
    """Trains the student of a bed; how many of the places it has found, and what that took."""
    model, target, shape, wanted = bed(seed)
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    optimizer = jumps(
        jax.random.key(0), model, optimizer, until=int(0.9 * steps), every=every, fraction=0.5
    )
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def step(params, state, key):
        x = jax.random.normal(key, shape)

        def loss(params):
            return ((nnx.merge(graphdef, params, rest, copy=True)(x) - target(x)) ** 2).mean()

        error, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, error

    step = jax.jit(step, donate_argnums=(0, 1))
    state, began = optimizer.init(params), None
    for i in range(steps):
        params, state, error = step(params, state, jax.random.fold_in(jax.random.key(seed), i))
        if began is None:
            error.block_until_ready()
            began = time.perf_counter()
    error = float(error)
    seconds = time.perf_counter() - began
    model = nnx.merge(graphdef, params, rest)
    (tuples,) = (m for _, m in nnx.iter_modules(model) if isinstance(m, PlacedTuples))
    found = np.asarray(tuples.indices())
    there = (found[:, None] == wanted[:, :, None]).all(-1).any(-1)
    looks = len(range(every // 2, int(0.9 * steps), every))
    candidates = looks * found.shape[0] * num_candidates(found.shape[1])
    return {
        "found": int(there.sum()),
        "of": there.size,
        "error": error,
        "steps": steps,
        "candidates": candidates,
        "ms": 1e3 * seconds / (steps - 1),
    }


def main(argv):
    del argv
    values, cases = flags.FLAGS, []
    beds = {
        "taps": (taps, 3000, 6, 0.03),
        "delays": (delays, 3000, 6, 0.03),
        "needles": (needles, 300, 4, 0.03),
    }
    for name in values.beds:
        for seed in range(values.seeds):
            cases.append(
                {"name": f"{name}, seed {seed}", **run(beds[name][0], seed, *beds[name][1:])}
            )
            print(cases[-1], flush=True)
    print(json.dumps({"cases": cases}))


if __name__ == "__main__":
    command.define_choices("beds", ["taps", "delays", "needles"], "Which of them.")
    flags.DEFINE_integer("seeds", 5, "Of each bed.", lower_bound=1)
    flags.DEFINE_integer("inputs", 1_000_000, "Of the needles.", lower_bound=_WEIGHTS)
    flags.DEFINE_integer("outputs", 1000, "Of the needles.", lower_bound=1)
    command.run(main)
