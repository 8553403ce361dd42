"""Layers of few weights against dense ones: inference, and a training step with jumps.

The bars, on two CPU cores: at 20 of 2048 inputs (1%) a training step takes at most half as long as
the dense layer's and inference a sixth; at 2 of 2048 (.1%) a training step, looks included, takes a
tenth.
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
# The default of `jumps`.
_EVERY = 50


def cases(small: bool) -> Iterator[dict[str, Any] | str]:
    """Yields the cases, of 64 inputs and outputs where small."""
    size = 64 if small else _SIZE
    x = jax.random.normal(jax.random.key(0), (_BATCH, size))
    dense = nnx.Linear(size, size, rngs=nnx.Rngs(0))
    cases, names = {}, []
    for each in _EACH:
        layer = SparseLinear(size, size, each, by_output=True, use_bias=True, rngs=nnx.Rngs(0))
        name = f"SparseLinear {size} x {size}, {each} of {size} inputs, b={_BATCH}"
        names.append((name, f"{name}, training step", f"{name}, both steps of a look"))
        flops = 2 * _BATCH * each * size
        ours = (
            _forward(nnx.view(layer, deterministic=True), x),
            _step(layer, x),
            _step(layer, x, look=True),
        )
        rivals = (_forward(dense, x), _step(dense, x), _step(dense, x))
        for case, *pair in zip(names[-1], ours, rivals, strict=True):
            labelled = dict(zip(("SparseLinear", "nnx.Linear"), pair, strict=True))
            cases[case] = labelled, {"flops": flops}
    rows = {}
    for row in compare_all(cases):
        rows[row["name"]] = row
        yield row
    for name, *steps in names:
        plain, look = (rows[step] for step in steps)
        if plain["speedup"] and look["speedup"]:
            mean = ((_EVERY - 2) * plain["ms"] + look["ms"]) / _EVERY
            yield (
                f"{name}: a training step takes {mean:.3f} ms in the mean, looks included, the "
                f"dense layer's {plain['rival_ms'] / mean:.1f} times as long"
            )


def _forward(model: nnx.Module, x: jax.Array) -> Contender:
    """The model as it is; other weights give other results: there is nothing to compare."""
    graphdef, state = nnx.split(model)
    return Contender(lambda state, x: nnx.merge(graphdef, state)(x), (state, x), same=False)


def _step(model: nnx.Module, x: jax.Array, *, look: bool = False) -> Contender:
    """Gradients of parameters and x, and an update by Adam, with jumps where there are places.

    With a `look`, both steps of one: the step that takes values away, and the one that decides.
    """
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optax.adam(1e-3)
    if isinstance(model, SparseLinear):
        optimizer = jumps(jax.random.key(0), model, optimizer, until=10**6, every=_EVERY)

    def step(params, rest, state, x):
        def loss(params, x):
            return (nnx.merge(graphdef, params, rest, copy=True)(x) ** 2).mean()

        gradients, dx = jax.grad(loss, (0, 1))(params, x)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, dx

    def both(params, rest, state, x):
        body = lambda _, carry: step(carry[0], rest, carry[1], x)  # noqa: E731
        return jax.lax.fori_loop(0, 2, body, (params, state, x))

    state = optimizer.init(params)
    if look:
        # Then `both` begins with the step that ends in doubts.
        state = state._replace(step=state.step + _EVERY // 2 - 1)
    return Contender(both if look else step, (params, rest, state, x), same=False)


if __name__ == "__main__":
    report.main(sparse=cases)
