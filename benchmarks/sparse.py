"""Layers of few weights against dense ones: inference, and a training step with jumps.

The bars, on two CPU cores: at 20 of 2048 inputs (1%) a training step takes at most half as long as
the dense layer's and inference a sixth; at 2 of 2048 (.1%) a training step takes a tenth.
"""

from collections.abc import Iterator
from typing import Any

import jax
import optax
from flax import nnx

from benchmarks.timing import Contender, compare, main
from hyperlayer_jax.nn import SparseLinear, jumps

_SIZE, _BATCH = 2048, 64
_EACH = (20, 2)


def cases() -> Iterator[dict[str, Any]]:
    x = jax.random.normal(jax.random.key(0), (_BATCH, _SIZE))
    dense = nnx.Linear(_SIZE, _SIZE, rngs=nnx.Rngs(0))
    for each in _EACH:
        layer = SparseLinear(_SIZE, _SIZE, each, by_output=True, use_bias=True, rngs=nnx.Rngs(0))
        weights = each * _SIZE
        name = f"SparseLinear {_SIZE} x {_SIZE}, {each} of {_SIZE} inputs, b={_BATCH}"
        # Nothing to compare: other weights.
        options = {"reference": lambda result: 0.0, "flops": 2 * _BATCH * weights}
        evaluation = nnx.view(layer, deterministic=True)
        yield from compare(
            name,
            {"SparseLinear": _forward(evaluation, x), "nnx.Linear": _forward(dense, x)},
            **options,
        )
        yield from compare(
            f"{name}, training step",
            {"SparseLinear": _step(layer, x), "nnx.Linear": _step(dense, x)},
            **options,
        )


def _forward(model: nnx.Module, x: jax.Array) -> Contender:
    graphdef, state = nnx.split(model)
    return Contender(lambda state, x: nnx.merge(graphdef, state)(x), (state, x))


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

    return Contender(step, (params, rest, optimizer.init(params), x))


if __name__ == "__main__":
    main(cases)
