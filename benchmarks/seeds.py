"""Models of several seeds that are trained side by side, in one program."""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from train import updates


class Progress(NamedTuple):
    """How far they have come.

    Attributes:
      step: the steps that are done.
      scalars: of every seed the means of its scalars since the last time, as `Updates` has them.
      states: of every seed the state of its model.
      ms: milliseconds of a step of all of them, since the last time.
    """

    step: int
    scalars: list[dict[str, float]]
    states: list[nnx.State]
    ms: float


def train(
    models: list[nnx.Module],
    optimizer: optax.GradientTransformation,
    loss_fn: updates.LossFn,
    data: Any,
    *,
    seed: int,
    steps: int,
    every: int,
) -> Iterator[Progress]:
    """Trains models that differ in their parameters alone; says how far they have come.

    Args:
      models: one for each seed.
      optimizer: of each.
      loss_fn: see `train.updates.make_updates`.
      data: that it gets.
      seed: of what the first draws; the next one has the next.
      steps: updates.
      every: steps after which it says so, and in the end.
    """
    update = updates.make_updates(nnx.split(models[0], nnx.Param, ...)[0], optimizer, loss_fn, None)
    advance = jax.jit(jax.vmap(update, in_axes=(0, None, 0, None)))
    states = []
    for model in models:
        _, params, rest = nnx.split(model, nnx.Param, ...)
        states.append(updates.State(jnp.int32(0), params, rest, optimizer.init(params), None))
    state = jax.tree.map(lambda *x: jnp.stack(x), *states)
    keys = jax.vmap(jax.random.key)(seed + jnp.arange(len(models)))
    advance = advance.lower(state, jnp.int32(0), keys, data).compile()
    for first in range(0, steps, every):
        stop = min(first + every, steps)
        begin = time.perf_counter()
        state, sums, *_ = advance(state, jnp.int32(stop), keys, data)
        sums = jax.tree.map(np.asarray, sums)
        ms = 1e3 * (time.perf_counter() - begin) / (stop - first)
        merged = nnx.merge_state(state.params, state.rest)
        yield Progress(
            stop,
            [
                {name: float(x[i]) / (stop - first) for name, x in sums.items()}
                for i in range(len(models))
            ],
            [jax.tree.map(lambda x, i=i: x[i], merged) for i in range(len(models))],
            ms,
        )
