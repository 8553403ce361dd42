"""Sparse attention against dense causal attention, and the length at which it overtakes it.

`gathered` reads 32 keys for each query, `block` 16 blocks of 64 keys for each 64 queries: its own,
and others drawn before it, of which some repeat in short sequences. The heads are 64 wide: on a CPU
4 of float32, elsewhere 8 of bfloat16. The difference is that of the last queries from dense
attention over the same keys. Whole layers, with 32 points for each token and head, follow.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.timing import Contender, compare, interleave, main, prepare, value_and_gradients
from hyperlayer_jax import kernels
from hyperlayer_jax.nn import SparseSelfAttention

_WIDTH, _POINTS, _BLOCK, _BLOCKS = 64, 32, 64, 16
_CHECKED = 128
_MAX_LENGTH = {"cpu": 2**12, "gpu": 2**17, "tpu": 2**14}
# Dense attention in plain XLA holds [heads,t,t].
_MAX_PLAIN_LENGTH = 2**14
_MAX_MODULE_LENGTH = {"cpu": 2**14, "gpu": 2**17, "tpu": 2**14}
_MODULE = "learned module forward + backward"


def cases() -> Iterator[dict[str, Any] | str]:
    on_cpu = jax.default_backend() == "cpu"
    heads, dtype = (4, jnp.float32) if on_cpu else (8, jnp.bfloat16)
    longest = _MAX_LENGTH[jax.default_backend()]
    module_lengths = _powers_of_2(_MAX_MODULE_LENGTH[jax.default_backend()])

    def at_all_lengths():
        for length in _powers_of_2(longest):
            q, k, v = jax.random.normal(jax.random.key(0), (3, heads, length, _WIDTH), dtype)
            q = q * jnp.asarray(_WIDTH**-0.5, dtype)
            for name in ("gathered", "block"):
                yield from _compare(name, q, k, v)
        for length in module_lengths:
            yield from _compare_modules(heads, length, dtype)

    ahead = {}
    for case in at_all_lengths():
        yield case
        name, length = case["name"].split(" t=")
        if case["speedup"] is not None:
            ahead.setdefault((name, case["rival"]), {})[int(length)] = case["speedup"] > 1
    for (name, rival), faster in ahead.items():
        behind = max((length for length, ours in faster.items() if not ours), default=0)
        after = [length for length in faster if length > behind]
        where = f"from t = {min(after)}" if after else f"nowhere up to t = {behind}"
        yield f"{name}: faster than {rival} {where}"
    yield from _costs_per_token(heads, module_lengths, dtype)


def _powers_of_2(longest):
    return [2**n for n in range(10, longest.bit_length())]


def _compare_modules(heads, length, dtype):
    """Whole layers, from tokens to tokens: projections, position network, sampling, attention.

    Dense attention is left out where it would hold too much. The difference is that of the compiled
    layer from the same layer run operation by operation.
    """
    layer = _module("learned", heads, length, dtype)
    eager = layer.function(*layer.arguments)
    kinds = ["window", "dense"] if length <= _MAX_PLAIN_LENGTH // 2 else ["window"]
    # One rival at a time: gigabytes that dense attention has just given back slow down its peers.
    for kind in kinds:
        yield from compare(
            f"{_MODULE} t={length}",
            {
                _MODULE: _with_gradients(layer, 0, 2),
                f"{kind} module": _with_gradients(_module(kind, heads, length, dtype), 0, 2),
            },
            reference=lambda result: float(jnp.abs(result[0] - eager).astype(jnp.float32).max()),
        )


def _module(kind, heads, length, dtype):
    features = heads * _WIDTH
    layer = SparseSelfAttention(
        features, heads, length, pattern=kind, num_tuples=4, num_global=4, num_local=2,
        dtype=dtype, rngs=nnx.Rngs(0),
    )  # fmt: skip
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    def run(params, rest, x):
        return nnx.merge(graphdef, params, rest, copy=True)(x)

    x = jax.random.normal(jax.random.key(0), (1, length, features), dtype)
    return Contender(run, (params, rest, x))


def _with_gradients(contender, *positions):
    return Contender(value_and_gradients(contender.function, *positions), contender.arguments)


def _costs_per_token(heads, lengths, dtype):
    """Time and memory of a token in learned layers of all lengths, whose runs take turns."""
    runs, spent = {}, {}
    for length in lengths:
        layer = _module("learned", heads, length, dtype)
        runs[length], spent[length] = prepare(_with_gradients(layer, 0, 2))
    us = {length: 1e6 * seconds / length for length, seconds in interleave(runs).items()}
    kb = {length: 1e3 * spent[length]["temporary_mb"] / length for length in lengths}
    for unit, each in (("us", us), ("kB", kb)):
        figures = ", ".join(f"{x:.3g} at {length}" for length, x in each.items())
        spread = max(each.values()) / min(each.values())
        yield f"{_MODULE}: {unit} per token {figures} (within {spread:.2f}x)"


def _compare(name, q, k, v):
    """Forward, then forward + backward in q, k, v (and the log weights)."""
    heads, length, width = q.shape
    indices = _indices(name, heads, length)
    log_weights = jnp.zeros(indices.shape, q.dtype)
    if name == "block":
        ours = functools.partial(kernels.block_attention, block=_BLOCK, causal=True)
        seen = indices.shape[-1] * _BLOCK
    else:
        ours, seen = kernels.gathered_attention, indices.shape[-1]

    expected = _dense_rows(name, q, k, v, indices)

    def difference(result):
        out = result[0] if isinstance(result, tuple) else result
        return float(jnp.abs(out[:, -_CHECKED:].astype(jnp.float32) - expected).max())

    operands = (q, k, v, indices, log_weights)
    dense_operands = tuple(jnp.moveaxis(x, 0, 1)[None] for x in (q, k, v))
    dense = {"dense cudnn": "cudnn"} if jax.default_backend() == "gpu" else {}
    if length <= _MAX_PLAIN_LENGTH:
        dense["dense xla"] = "xla"
    rivals = {
        label: functools.partial(
            jax.nn.dot_product_attention, is_causal=True, scale=1.0, implementation=implementation
        )
        for label, implementation in dense.items()
    }
    flops = 4 * heads * length * seen * width
    for direction, factor in (("forward", 1), ("forward + backward", 3.5)):
        contenders = {name: Contender(ours, operands)}
        contenders |= {label: Contender(rival, dense_operands) for label, rival in rivals.items()}
        if factor > 1:
            contenders = {
                label: _with_gradients(c, *(0, 1, 2, 4)[: len(c.arguments)])
                for label, c in contenders.items()
            }
        yield from compare(
            f"{name} {direction} t={length}", contenders, flops=factor * flops, reference=difference
        )


def _indices(name, heads, length):
    """Of each query, or block of queries, the own and others before it."""
    rows, entries = (length // _BLOCK, _BLOCKS) if name == "block" else (length, _POINTS)
    rng = np.random.default_rng(0)
    own = np.arange(rows)[:, None]
    drawn = rng.random((heads, rows, entries)) * (own + 1)
    return jnp.asarray(np.where(np.arange(entries) == 0, own, drawn).astype(np.int32))


def _dense_rows(name, q, k, v, indices):
    """The last queries of what `name` computes, through the weight of every key."""
    length = q.shape[1]
    block = _BLOCK if name == "block" else 1
    last = indices[:, -_CHECKED // block :]
    weights = jax.nn.one_hot(last, length // block, dtype=jnp.float32).sum(-2)
    weights = jnp.repeat(jnp.repeat(weights, block, axis=1), block, axis=2)
    causal = np.arange(length) <= np.arange(length - _CHECKED, length)[:, None]
    q, k, v = (x.astype(jnp.float32) for x in (q[:, -_CHECKED:], k, v))
    logits = jnp.einsum("hqd,hkd->hqk", q, k, precision="highest")
    logits = logits + jnp.log(jnp.where(causal, weights, 0))
    weights = jax.nn.softmax(logits, axis=-1)
    return jnp.einsum("hqk,hkd->hqd", weights, v, precision="highest")


if __name__ == "__main__":
    main(cases)
