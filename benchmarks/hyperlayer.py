"""Redistribution and the removal of copies, against the cheapest passes over as many numbers."""

import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hyperlayer_jax as hl
from benchmarks import report
from benchmarks.accuracy import in_float32
from benchmarks.contenders import Contender, by_name, value_and_gradients, with_gradients
from benchmarks.timing import compare, peak_mb
from hyperlayer_jax import kernels

_SPACE = 1000
# Chunks, tuples and points of each.
_SHAPES = {"cpu": ((64, 64, 768),), "gpu": ((1024, 64, 768), (4096, 64, 768))}
_SMALL = (2, 8, 48)
_LARGE, _SMALL_LARGE = (4096, 49152), (64, 768)


def cases(small: bool = False) -> Iterator[dict[str, Any] | str]:
    """Chunks of a usual size, and one large one."""
    like = "cpu" if jax.default_backend() == "cpu" else "gpu"
    for b, k, m in (_SMALL,) if small else _SHAPES[like]:
        yield from _chunks(b, k, m)
    case = _large_chunk(*(_SMALL_LARGE if small else _LARGE))
    yield case
    yield f"{case['name']}: {case['peak_mb']:.0f} MB at its peak"


def _chunks(b, k, m):
    arguments = _example(b, k, m)
    points = arguments[0]
    array = jax.random.normal(jax.random.key(1), (b, k, m))
    contenders = by_name("redistribute", _spread, arguments, (1, 2, 3))
    softmax = Contender(_by_softmax, arguments, (1, 2, 3))
    yield from compare(
        f"redistribute b={b} k={k} m={m} r=2 + backward",
        {
            **with_gradients(contenders | {"softmax": softmax}),
            "exp(a).sum(-1) of [b,k,m]": Contender(
                lambda array: jnp.exp(array).sum(-1), (array,), same=False
            ),
        },
        nbytes=4 * b * (2 * m + 2 * 5 * k + m),
        flops=30 * b * k * m,
        expected=in_float32(softmax.with_gradients()),
    )
    yield from compare(
        f"duplicate_mask b={b} m={m} r=2",
        {
            "duplicate_mask": Contender(hl.duplicate_mask, (points,)),
            "sort of [b,m]": Contender(
                lambda x: jnp.sort(x, axis=-1), (points[..., 0],), same=False
            ),
        },
        expected=functools.partial(_copies, points),
    )


def _example(b, k, m):
    """Points int32 [b,m,2], means and sigmas [b,k,2], values [b,k]."""
    keys = jax.random.split(jax.random.key(0), 4)
    return (
        jax.random.randint(keys[0], (b, m, 2), 0, _SPACE),
        jax.random.uniform(keys[1], (b, k, 2), maxval=_SPACE),
        1 + 50 * jax.random.uniform(keys[2], (b, k, 2)),
        jax.random.normal(keys[3], (b, k)),
    )


def _spread(points, means, sigmas, values, implementation=None):
    """`hl.redistribute`, which removes copies first; of one backend if that is named."""
    if implementation is None:
        return hl.redistribute(points, hl.IndexTuples(means, sigmas, values))
    return kernels.redistribute(points, means, sigmas, values, implementation=implementation)


def _by_softmax(points, means, sigmas, values):
    """What `redistribute` means, differentiated by JAX."""
    offsets = (points[:, None].astype(means.dtype) - means[:, :, None]) / sigmas[:, :, None]
    logits = jnp.where(hl.duplicate_mask(points)[:, None], -jnp.inf, -(offsets**2).sum(-1) / 2)
    return jnp.einsum("bk,bkm->bm", values, jax.nn.softmax(logits, axis=-1))


def _copies(points):
    """All but the first of equal points, chunk by chunk."""
    copies = np.ones(points.shape[:-1], bool)
    numbers = np.asarray(points, np.int64) @ [_SPACE, 1]
    for chunk, copy in zip(numbers, copies, strict=True):
        copy[np.unique(chunk, return_index=True)[1]] = False
    return copies


def _large_chunk(k, m):
    """Time and peak memory of one large chunk, in a process of its own."""
    command = [
        sys.executable,
        "-c",
        f"from benchmarks import hyperlayer; hyperlayer.peak({k}, {m})",
    ]
    # Beside a process that has taken most of a GPU's memory, it takes what it needs.
    env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    child = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=env)
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
    """Prints the milliseconds of a chunk, and the MB that it adds to the peak of this process."""
    arguments = jax.block_until_ready(_example(1, k, m))
    run = jax.jit(value_and_gradients(_spread, 1, 2, 3)).lower(*arguments).compile()
    before = peak_mb() or _host_peak_mb()
    start = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    milliseconds = 1e3 * (time.perf_counter() - start)
    print(json.dumps({"ms": milliseconds, "peak_mb": (peak_mb() or _host_peak_mb()) - before}))


def _host_peak_mb():
    """From Linux: `getrusage` would count what the parent held when it made this process."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1.024e-3 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


if __name__ == "__main__":
    report.main(redistribution=cases)
