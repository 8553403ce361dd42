"""Redistribution and the removal of copies, against the cheapest passes over as many numbers."""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import Contender, compare, main, value_and_gradients
from hyperlayer_jax.density import redistribute
from hyperlayer_jax.sampling import duplicate_mask
from hyperlayer_jax.types import IndexTuples

_SPACE = 1000


def cases() -> Iterator[dict[str, Any]]:
    b, k, m = 64, 64, 768
    points, *tuples = _example(b, k, m)
    array = jax.random.normal(jax.random.key(1), (b, k, m))

    def exp_sum(array):
        return jnp.exp(array).sum(-1)

    yield from compare(
        f"redistribute b={b} k={k} m={m} r=2 + backward",
        {
            "redistribute": Contender(_with_gradients, (points, *tuples)),
            "exp(a).sum(-1) of [b,k,m]": Contender(exp_sum, (array,)),
        },
        nbytes=4 * b * (2 * m + 2 * 5 * k + m),
        flops=30 * b * k * m,
        reference=lambda result: _largest_difference(
            result, jax.jit(value_and_gradients(_by_softmax, 1, 2, 3))(points, *tuples)
        ),
    )
    column = points[..., 0]
    yield from compare(
        f"duplicate_mask b={b} m={m} r=2",
        {
            "duplicate_mask": Contender(duplicate_mask, (points,)),
            "sort of [b,m]": Contender(lambda x: jnp.sort(x, axis=-1), (column,)),
        },
        reference=lambda result: float((np.asarray(result) != _copies(points)).sum()),
    )
    yield _large_chunk()


def _example(b, k, m):
    """Points int32 [b,m,2], means and sigmas [b,k,2], values [b,k]."""
    keys = jax.random.split(jax.random.key(0), 4)
    return (
        jax.random.randint(keys[0], (b, m, 2), 0, _SPACE),
        jax.random.uniform(keys[1], (b, k, 2), maxval=_SPACE),
        1 + 50 * jax.random.uniform(keys[2], (b, k, 2)),
        jax.random.normal(keys[3], (b, k)),
    )


def _spread(points, *tuples):
    return redistribute(points, IndexTuples(*tuples))


_with_gradients = value_and_gradients(_spread, 1, 2, 3)


def _by_softmax(points, means, sigmas, values):
    """What `redistribute` means, differentiated by JAX."""
    offsets = (points[:, None].astype(means.dtype) - means[:, :, None]) / sigmas[:, :, None]
    logits = jnp.where(duplicate_mask(points)[:, None], -jnp.inf, -(offsets**2).sum(-1) / 2)
    return jnp.einsum("bk,bkm->bm", values, jax.nn.softmax(logits, axis=-1))


def _largest_difference(result, expected):
    differences = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), result, expected)
    return max(jax.tree.leaves(differences))


def _copies(points):
    """All but the first of equal points, chunk by chunk."""
    copies = np.ones(points.shape[:-1], bool)
    for chunk, copy in zip(np.asarray(points), copies, strict=True):
        copy[np.unique(chunk, axis=0, return_index=True)[1]] = False
    return copies


def _large_chunk():
    """Time and peak memory of one large chunk, in a process of its own."""
    k, m = 4096, 49152
    command = [
        sys.executable,
        "-c",
        f"from benchmarks import hyperlayer; hyperlayer.peak({k}, {m})",
    ]
    child = subprocess.run(command, capture_output=True, check=True, text=True)
    return {
        "name": f"redistribute b=1 k={k} m={m} r=2 + backward",
        "rival": "an array of [m,k]",
        "rival_ms": None,
        "speedup": None,
        "max_difference": None,
        "floor_fraction": None,
        "rival_peak_mb": 4 * k * m / 1e6,
        **json.loads(child.stdout),
    }


def peak(k: int, m: int) -> None:
    """Prints the milliseconds of a chunk, and the MB of this process that it adds."""
    arguments = jax.block_until_ready(_example(1, k, m))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run = jax.jit(_with_gradients).lower(*arguments).compile()
    start = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"ms": 1e3 * seconds, "peak_mb": 1024 * (after - before) / 1e6}))


if __name__ == "__main__":
    main(cases)
