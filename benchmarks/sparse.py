"""Layers of few weights against dense ones: inference, and a training step with jumps.

The bars, on two CPU cores: at 20 of 2048 inputs (1%) a training step takes at most half as long as
the dense layer's and inference a sixth; at 2 of 2048 (.1%) a training step takes a tenth.
"""

from collections.abc import Iterator
from typing import Any

import jax
import optax
from flax import nnx

from benchmarks import report
from benchmarks.contenders import Contender
from benchmarks.timing import compare_all
from hyperlayer_jax.nn import SparseLinear, jumps

_SIZE, _BATCH = 2048, 64
_EACH = (20, 2)


def cases(small: bool) -> Iterator[dict[str, Any]]:
    """Yields the cases, of 64 inputs and outputs where small."""
    size = 64 if small else _SIZE
    x = jax.random.normal(jax.random.key(0), (_BATCH, size))
    dense = nnx.Linear(size, size, rngs=nnx.Rngs(0))
    cases = {}
    for each in _EACH:
        layer = SparseLinear(size, size, each, by_output=True, use_bias=True, rngs=nnx.Rngs(0))
        weights = each * size
        name = f"SparseLinear {size} x {size}, {each} of {size} inputs, b={_BATCH}"
        flops = {"flops": 2 * _BATCH * weights}
        evaluation = nnx.view(layer, deterministic=True)
        for case, run, ours in (
            (name, _forward, evaluation),
            (f"{name}, training step", _step, layer),
        ):
            cases[case] = {"SparseLinear": run(ours, x), "nnx.Linear": run(dense, x)}, flops
    yield from compare_all(cases)


def _forward(model: nnx.Module, x: jax.Array) -> Contender:
    """The model as it is; other weights give other results: there is nothing to compare."""
    graphdef, state = nnx.split(model)
    return Contender(lambda state, x: nnx.merge(graphdef, state)(x), (state, x), same=False)


def _step(model: nnx.Module, x: jax.Array) -> Contender:
    """Gradients of parameters and x, and an update by Adam, with jumps where there are places."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optax.adam(1e-3)
    if isinstance(model, SparseLinear):
        optimizer = jumps(jax.random.key(0), model, optimizer, until=10**6)

    def step(params, rest, state, x):
        def loss(params, x):
            return (nnx.merge(graphdef, params, rest, copy=True)(x) ** 2).mean()

        gradients, dx = jax.grad(loss, (0, 1))(params, x)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, dx

    return Contender(step, (params, rest, optimizer.init(params), x), same=False)


if __name__ == "__main__":
    report.main(sparse=cases)
