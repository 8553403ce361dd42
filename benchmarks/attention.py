"""Sparse attention against dense causal attention, and the length at which it overtakes it.

`gathered` reads 32 keys for each query, `block` 16 blocks of 64 keys for each 64 queries: its own,
and others drawn before it, of which some repeat in short sequences. The heads are 64 wide: on a CPU
4 of float32, elsewhere 8 of bfloat16. A window sees as many keys of each query as the sparse form.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from benchmarks.accuracy import in_float32
from benchmarks.contenders import PLAIN, Contender, by_name, with_gradients
from benchmarks.timing import compare_all
from hyperlayer_jax import kernels

WIDTH, BLOCK = 64, 64
_POINTS, _BLOCKS = 32, 16
_LENGTHS = {"cpu": (2**10, 2**11, 2**12), "gpu": (2**14, 2**16), "tpu": (2**13, 2**14)}
_SMALL = 128
# Dense attention in plain XLA holds [heads,t,t].
_MAX_PLAIN_LENGTH = 2**14


def block(small: bool = False) -> Iterator[dict[str, Any] | str]:
    """Attention over blocks of keys."""
    yield from _at_all_lengths("block", small)


def gathered(small: bool = False) -> Iterator[dict[str, Any] | str]:
    """Attention over single keys."""
    yield from _at_all_lengths("gathered", small)


def heads_and_dtype() -> tuple[int, Any]:
    """As many and as wide as suit the device."""
    return (4, jnp.float32) if jax.default_backend() == "cpu" else (8, jnp.bfloat16)


def operands(
    name: str, heads: int, length: int, dtype: Any, *, entries: int | None = None, hot: bool = False
) -> tuple[jax.Array, ...]:
    """q, k, v [heads,length,64], and for each row its indices and log weights.

    Args:
      name: `block` or `gathered`.
      heads: alike in all but their numbers.
      length: of the sequence.
      dtype: of the floats.
      entries: of each row; by default 16 blocks, or 32 keys.
      hot: every row has the first block, or key, besides its own.
    """
    q, k, v = jax.random.normal(jax.random.key(0), (3, heads, length, WIDTH), dtype)
    q = q * jnp.asarray(WIDTH**-0.5, dtype)
    rows, usual = (length // BLOCK, _BLOCKS) if name == "block" else (length, _POINTS)
    rng = np.random.default_rng(0)
    own = np.arange(rows)[:, None]
    drawn = rng.random((heads, rows, entries or usual)) * (own + 1)
    drawn[..., 0] = own[:, 0]
    if hot:
        drawn[..., 1] = 0
    log_weights = rng.standard_normal(drawn.shape)
    return q, k, v, jnp.asarray(drawn.astype(np.int32)), jnp.asarray(log_weights, dtype)


def contenders(name: str, arguments: tuple[jax.Array, ...]) -> dict[str, Contender]:
    """Our attention by default and by every backend, and as gather + einsum."""
    function, plain = {
        "block": (functools.partial(kernels.block_attention, block=BLOCK, causal=True), _by_block),
        "gathered": (kernels.gathered_attention, _by_key),
    }[name]
    gradients = (0, 1, 2, 4)
    named = by_name(f"{name}_attention", function, arguments, gradients)
    return named | {"gather + einsum": Contender(plain, arguments, gradients)}


def _by_block(q, k, v, indices, log_weights):
    """As a user would write it. Rows r of queries i, entries p of keys j."""
    heads = np.arange(len(q))[:, None, None]
    q, k, v = (x.reshape(len(x), -1, BLOCK, WIDTH) for x in (q, k, v))
    k, v = k[heads, indices], v[heads, indices]
    logits = jnp.einsum("hrid,hrpjd->hripj", q, k, preferred_element_type=jnp.float32)
    logits = logits + log_weights.astype(jnp.float32)[:, :, None, :, None]
    token = np.arange(BLOCK, dtype=np.int32)
    keys = indices[:, :, None, :, None] * BLOCK + token
    queries = np.arange(q.shape[1], dtype=np.int32)[:, None] * BLOCK + token
    logits = jnp.where(keys <= queries[None, :, :, None, None], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=(-2, -1)).astype(v.dtype)
    return jnp.einsum("hripj,hrpjd->hrid", weights, v).reshape(len(q), -1, WIDTH)


def _by_key(q, k, v, indices, log_weights):
    heads = np.arange(len(q))[:, None, None]
    k, v = k[heads, indices], v[heads, indices]
    logits = jnp.einsum("htd,htpd->htp", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits + log_weights.astype(jnp.float32), axis=-1).astype(v.dtype)
    return jnp.einsum("htp,htpd->htd", weights, v)


def _at_all_lengths(name, small):
    lengths = (_SMALL,) if small else _LENGTHS[jax.default_backend()]
    yield from overtaking(case for cases in _rounds(name, lengths) for case in compare_all(cases))


def _rounds(name, lengths):
    """Yields cases that are compiled together: what is chosen against dense attention, which is
    there in seconds; then against other backends and plain JAX, which may take a minute."""
    heads, dtype = heads_and_dtype()
    drawn = {length: operands(name, heads, length, dtype) for length in lengths}
    ours = {length: contenders(name, arguments) for length, arguments in drawn.items()}
    chosen, dense = f"{name}_attention", {}
    for length, arguments in drawn.items():
        rivals = _dense(arguments[:3], _seen(name, arguments))
        dense |= _both_ways(name, arguments, {chosen: ours[length][chosen]} | rivals)
    yield dense
    for length, arguments in drawn.items():
        yield _both_ways(name, arguments, ours[length], ours[length]["gather + einsum"])


def overtaking(cases: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any] | str]:
    """The cases, whose names end with a length, and from which length each rival is behind.

    Backends by name are no rivals: the rule speaks of them.
    """
    ahead = {}
    for case in cases:
        yield case
        name, length = case["name"].split(" t=")
        backend = case["rival"] in PLAIN or "rival_passes" in case
        if case["speedup"] is not None and not backend:
            ahead.setdefault((name, case["rival"]), {})[int(length)] = case["speedup"] > 1
    for (name, rival), faster in ahead.items():
        behind = max((length for length, ours in faster.items() if not ours), default=0)
        after = [length for length in faster if length > behind]
        where = f"from t = {min(after)}" if after else f"nowhere up to t = {behind}"
        yield f"{name}: faster than {rival} {where}"


def _seen(name, arguments):
    """How many keys a query sees."""
    return arguments[3].shape[-1] * (BLOCK if name == "block" else 1)


def _both_ways(name, arguments, every, exact=None):
    """Forward, then forward + backward in q, k, v and the log weights: what `compare_all` takes."""
    heads, length, _ = arguments[0].shape
    flops = 4 * heads * length * _seen(name, arguments) * WIDTH
    ways = {
        "forward": (every, exact, flops),
        "forward + backward": (
            with_gradients(every),
            exact and exact.with_gradients(),
            3.5 * flops,
        ),
    }
    return {
        f"{name} {way} t={length}": (
            every,
            {"flops": flops, "expected": exact and in_float32(exact)},
        )
        for way, (every, exact, flops) in ways.items()
    }


def _dense(qkv, seen):
    """Attention to every key before the query, and to the last `seen`, from JAX itself."""
    arguments = tuple(jnp.moveaxis(x, 0, 1)[None] for x in qkv)

    def contender(implementation, **options):
        function = functools.partial(
            jax.nn.dot_product_attention,
            is_causal=True,
            scale=1.0,
            implementation=implementation,
            **options,
        )
        return Contender(function, arguments, (0, 1, 2), same=False)

    if jax.default_backend() == "gpu":
        return {
            "dense cudnn": contender("cudnn"),
            "window cudnn": contender("cudnn", local_window_size=(seen - 1, 0)),
        }
    fits = len(qkv[0][0]) <= _MAX_PLAIN_LENGTH
    return {"dense xla": contender("xla")} if fits else {}


if __name__ == "__main__":
    report.main(block=block, gathered=gathered)
