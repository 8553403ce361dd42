"""Many steps of training as one compiled function, which stops where something is not finite."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from train import checkpoints, devices

Scalars = dict[str, Any]
LossFn = Callable[[nnx.Module, jax.Array, Any], tuple[jax.Array, Scalars]]


def warmup_cosine(highest: float, steps: int, *, warmup: int, last: float = 0.0) -> optax.Schedule:
    """A step size that rises from 0 to its highest, and falls to its last like half a cosine.

    Args:
      highest: step size.
      steps: of the run.
      warmup: steps that it rises for; a tenth of all at most.
      last: step size.
    """
    rising = min(warmup, steps // 10)
    return optax.warmup_cosine_decay_schedule(0.0, highest, rising, steps, last)


class State(NamedTuple):
    """All that changes from step to step."""

    step: jax.Array
    params: nnx.State
    rest: nnx.State
    opt_state: optax.OptState
    average: nnx.State | None


# (state, stop, key, data) -> (state, sums, last, finite), see `make_updates`.
Updates = Callable[..., tuple[State, Scalars, jax.Array, jax.Array]]


def make_updates(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    loss_fn: LossFn,
    average: float | None,
) -> Updates:
    """Makes the function that takes many steps; how many is no matter of compilation.

    It returns the state, the sums of the scalars of all steps, the last loss, and whether the
    last loss, its gradients and the parameters that came of them were finite: bool [1 + 2n] for n
    arrays of parameters, in the order of `checked`.
    """

    @jax.jit
    def update(state: State, key: jax.Array, data: Any) -> tuple[State, Scalars, jax.Array]:
        def objective(params):
            model = nnx.merge(graphdef, params, state.rest, copy=True)
            loss, metrics = loss_fn(model, jax.random.fold_in(key, state.step), data)
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
        arrays = [scalars["loss"], *jax.tree.leaves(gradients), *jax.tree.leaves(params)]
        finite = jnp.stack([jnp.isfinite(x).all() for x in arrays])
        return State(step, params, rest, opt_state, mean), scalars, finite

    def updates(state: State, stop: jax.Array, key: jax.Array, data: Any):
        def proceed(carry):
            state, _, _, finite = carry
            return (state.step < stop) & finite.all()

        def body(carry):
            state, sums, _, _ = carry
            state, scalars, finite = update(state, key, data)
            return state, jax.tree.map(jnp.add, sums, scalars), scalars["loss"], finite

        _, scalars, finite = jax.eval_shape(update, state, key, data)
        zeros = jax.tree.map(lambda scalar: jnp.zeros(scalar.shape, scalar.dtype), scalars)
        carry = state, zeros, zeros["loss"], jnp.ones(finite.shape, bool)
        return jax.lax.while_loop(proceed, body, carry)

    return updates


def checked(params: nnx.State) -> list[str]:
    """What is looked at in every step, in words."""
    names = checkpoints.names_of(params)
    return ["loss", *(f"gradient of {name}" for name in names), *(f"new {name}" for name in names)]


def traced(updates: Updates, mesh: jax.sharding.Mesh, state: State, key: Any, data: Any) -> Any:
    """Traces updates for the devices of a mesh; a call takes the state away.

    State, key and data may be arrays or what `jax.ShapeDtypeStruct` says of them.
    """
    shardings = jax.tree.map(lambda x: x.sharding, state)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    out_shardings = (shardings, everywhere, everywhere, everywhere)
    jitted = jax.jit(updates, donate_argnums=0, out_shardings=out_shardings)
    with devices.use(mesh):
        return jitted.trace(state, np.int32(0), key, data)


def compiled(updates: Updates, mesh: jax.sharding.Mesh, state: State, key: Any, data: Any) -> Any:
    """Compiles updates for the devices of a mesh, see `traced`.

    Raises:
      FlagError: the step would take more memory than there is. An array that is too large is
        found before anything is compiled.
    """
    program = traced(updates, mesh, state, key, data)
    size, shape = devices.largest(program.jaxpr.jaxpr)
    devices.check_fits(f"an array {shape} in a step of training", size / mesh.size)
    with devices.use(mesh):
        executable = program.lower().compile()
    sizes = executable.memory_analysis()
    if sizes is not None:
        taken = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
        devices.check_fits("a step of training", taken)
    return executable
