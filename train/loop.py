"""The training loop of every task."""

import contextlib
import json
import os
import pathlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tensorboardX
from flax import nnx
from tqdm import tqdm

Scalars = dict[str, Any]
LossFn = Callable[[nnx.Module, jax.Array, jax.Array, Any], tuple[jax.Array, Scalars]]


class _State(NamedTuple):
    step: jax.Array
    params: nnx.State
    rest: nnx.State
    opt_state: optax.OptState
    average: nnx.State | None


def train(
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    loss_fn: LossFn,
    data: Any,
    *,
    key: jax.Array,
    steps: int,
    workdir: pathlib.Path,
    average: float | None = None,
    log_every: int = 50,
    evaluate: Callable[[nnx.Module, int], Scalars] | None = None,
    evaluate_every: int = 500,
) -> tuple[nnx.Module, Scalars]:
    """Trains a model; Python runs only once in `log_every` steps.

    Writes to `workdir`: `metrics.jsonl` and TensorBoard events as it goes, and in the end `params`,
    an Orbax checkpoint of all of the model but its random streams. The first Ctrl-C ends the loop
    after the steps under way, with everything written; a second one ends it at once.

    Args:
      model: its `nnx.Param` are trained; all other state, random streams included, is carried from
        step to step. The model itself is left as it is.
      optimizer: from Optax; learning-rate schedules, clipping and the like belong in here.
      loss_fn: `(model, key, step, data) -> (loss, metrics)`, the loss a scalar and the metrics a
        dict of scalars, both logged as means over `log_every` steps. It draws its own batch from
        `data` with `key`, which is new in each step; `step` is an int32 scalar that counts from 0.
      data: a tree of arrays, put on the device once.
      key: PRNG key. With the number of the step, it decides the batch.
      steps: number of updates.
      workdir: folder to write to; made if it is missing.
      average: if given, the decay in [0, 1) of an exponential moving average of the parameters (a
        plain mean until there are enough of them). The averaged parameters are the ones that are
        evaluated, saved and returned.
      log_every: steps per line of metrics.
      evaluate: `(model, step) -> figures`, called before the first step, every `evaluate_every`
        steps and after the last; the figures, if any, are logged and printed. Interrupted, the
        loop ends without a last call.
      evaluate_every: see `evaluate`.

    Returns:
      The trained model, and the figures `steps`, `train_seconds` (updates alone),
      `compile_seconds` and `loss` (mean over the last line of metrics).

    Raises:
      FloatingPointError: the loss of a step is not finite.
      KeyboardInterrupt: Ctrl-C; says how far it came.
    """
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    updates = _make_updates(graphdef, optimizer, loss_fn, average)

    def evaluated(state: _State) -> nnx.Module:
        best = state.params if state.average is None else state.average
        return nnx.merge(graphdef, *_copy((best, state.rest)))

    # Updates are donated their state: nothing else may own its arrays, nor may it hold one twice.
    params, rest = _copy((params, rest))
    state = _State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        rest=rest,
        opt_state=optimizer.init(params),
        average=None if average is None else _copy(params),
    )
    data = jax.device_put(data)
    began = time.perf_counter()
    compiled = jax.jit(updates, donate_argnums=0).lower(state, np.int32(0), key, data).compile()
    compile_seconds = time.perf_counter() - began

    step, train_seconds = 0, 0.0
    intervals = [log_every] if evaluate is None else [log_every, evaluate_every]
    workdir.mkdir(parents=True, exist_ok=True)
    with (
        _deferred_interrupt() as interrupts,
        _metric_writer(workdir) as write,
        tqdm(total=steps, unit="step") as bar,
    ):
        while True:
            if evaluate is not None and (step % evaluate_every == 0 or step == steps):
                figures = {name: float(x) for name, x in evaluate(evaluated(state), step).items()}
                if figures:
                    write(step, figures)
                    texts = (f"{name} {figure:.4g}" for name, figure in figures.items())
                    bar.write("  ".join([f"step {step}", *texts]))
            if interrupts or step == steps:
                break
            stop = min(steps, *(_next_multiple(step, interval) for interval in intervals))
            began = time.perf_counter()
            state, sums, loss = compiled(state, np.int32(stop), key, data)
            done, sums, loss = jax.device_get((state.step, sums, loss))
            train_seconds += time.perf_counter() - began
            if not np.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {done} of {steps}")
            means = {name: float(total) / (stop - step) for name, total in sums.items()}
            write(stop, means)
            bar.set_postfix(loss=f"{means['loss']:.4g}", refresh=False)
            bar.update(stop - step)
            step = stop
        trained = evaluated(state)
        save_params(workdir / "params", trained)
    if interrupts:
        raise KeyboardInterrupt(f"interrupted after step {step} of {steps}, which is saved")
    return trained, {
        "steps": steps,
        "train_seconds": train_seconds,
        "compile_seconds": compile_seconds,
        "loss": means["loss"],
    }


def _make_updates(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    loss_fn: LossFn,
    average: float | None,
) -> Callable[..., tuple[_State, Scalars, jax.Array]]:
    """Makes the function that takes many steps; how many is no matter of compilation."""

    @jax.jit
    def update(state: _State, key: jax.Array, data: Any) -> tuple[_State, Scalars]:
        def objective(params):
            model = nnx.merge(graphdef, params, state.rest, copy=True)
            loss, metrics = loss_fn(model, jax.random.fold_in(key, state.step), state.step, data)
            scalars = jax.tree.map(jnp.float32, {"loss": loss, **metrics})
            return loss, (scalars, nnx.split(model, nnx.Param, ...)[2])

        gradients, (scalars, rest) = jax.grad(objective, has_aux=True)(state.params)
        step, mean = state.step + 1, state.average
        # Optax itself promotes, where a caller may have asked JAX for strictness.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            if average is not None:
                weight = jnp.maximum(1 - average, 1 / step)
                mean = optax.incremental_update(params, mean, weight)
        return _State(step, params, rest, opt_state, mean), scalars

    def updates(state: _State, stop: jax.Array, key: jax.Array, data: Any):
        """Steps up to `stop`, or to the first loss that is not finite; sums their scalars."""

        def proceed(carry):
            state, _, last = carry
            return (state.step < stop) & jnp.isfinite(last["loss"])

        def body(carry):
            state, sums, _ = carry
            state, scalars = update(state, key, data)
            return state, jax.tree.map(jnp.add, sums, scalars), scalars

        shapes = jax.eval_shape(update, state, key, data)[1]
        zeros = jax.tree.map(lambda scalar: jnp.zeros(scalar.shape, scalar.dtype), shapes)
        state, sums, last = jax.lax.while_loop(proceed, body, (state, zeros, zeros))
        return state, sums, last["loss"]

    return updates


def save_params(path: pathlib.Path, model: nnx.Module) -> None:
    """Saves all of a model's state but its random streams, whole or not at all."""
    state = nnx.state(model, nnx.Not(nnx.RngState))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), nnx.to_pure_dict(state), force=True)


def _copy(tree):
    return jax.tree.map(jnp.copy, tree)


def _next_multiple(step: int, interval: int) -> int:
    return (step // interval + 1) * interval


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[list[int]]:
    """Gathers the first Ctrl-C in the list that it yields; the next ones act as ever."""
    interrupts = []

    def note(signum, frame):
        interrupts.append(signum)
        signal.signal(signal.SIGINT, previous)
        os.write(2, b"\nstopping after these steps; again to stop at once\n")

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def _metric_writer(workdir: pathlib.Path) -> Iterator[Callable[[int, Scalars], None]]:
    with (
        open(workdir / "metrics.jsonl", "w", buffering=1) as lines,
        tensorboardX.SummaryWriter(str(workdir)) as events,
    ):

        def write(step: int, scalars: Scalars) -> None:
            lines.write(json.dumps({"step": step, **scalars}) + "\n")
            for name, scalar in scalars.items():
                events.add_scalar(name, scalar, step)

        yield write
