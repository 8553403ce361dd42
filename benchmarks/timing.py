"""How every benchmark measures and reports: rivals in turn in one process, medians, a floor.

A suite is a function that yields cases, made by `compare`, and statements, which are strings. Its
module ends with `timing.main(suite)`.

Every case states the time that the device would need at least, its floor: the bytes and operations
that the case cannot avoid, over the rates that a pass over memory and a matrix product reach here.

Memory that a case has used stays with the process, as it does in a training loop that is compiled
as a whole. Linux would otherwise take large arrays back after every call and hand them out cleared,
which is a fifth of the time of a layer.
"""

import ctypes
import dataclasses
import datetime
import functools
import json
import math
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

_SECONDS_PER_RUN = 2.0
_MAX_ROUNDS = 15
_BATCH_SECONDS = 0.005
_MAX_BATCH = 20
# More than the last cache of any GPU: inputs rotate through this many bytes there.
_ROTATED_BYTES = 2**28


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    Attributes:
      function: of `arguments`; compiled unless `on_host`.
      arguments: arrays.
      on_host: whether `function` is plain Python.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    on_host: bool = False


def compare(
    name: str,
    contenders: dict[str, Contender],
    *,
    nbytes: int | None = None,
    flops: int = 0,
    reference: Callable[[Any], float] | None = None,
) -> Iterator[dict[str, Any]]:
    """Times the first contender against each of the others.

    Args:
      name: of the case.
      contenders: by name. One that does not fit into memory is reported so.
      nbytes: read and written at least; by default the arguments and results of the first.
      flops: done at least.
      reference: the largest difference of the first contender's result from what it should be;
        by default that from the result of each rival.

    Yields:
      A case for each rival: times in ms (medians), compilation and peak of temporary memory apart.
    """
    runs, results, spent = {}, {}, {}
    for label, contender in contenders.items():
        try:
            runs[label], spent[label] = prepare(contender)
            results[label] = jax.block_until_ready(runs[label](0))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            runs.pop(label, None)
    ours, *rivals = contenders
    if nbytes is None:
        arrays = jax.tree.leaves((contenders[ours].arguments, results[ours]))
        nbytes = sum(x.nbytes for x in arrays)
    dtype = jax.tree.leaves(results[ours])[0].dtype
    floor = nbytes / _bytes_per_second()
    if flops:
        floor = max(floor, flops / _flops_per_second(dtype.name))
    differences = {
        rival: reference(results[ours]) if reference else _difference(results[ours], result)
        for rival, result in results.items()
        if rival != ours
    }
    results.clear()
    seconds = interleave(runs)
    for rival in rivals:
        fits = rival in seconds
        yield {
            "name": name,
            "ms": 1e3 * seconds[ours],
            "rival": rival,
            "rival_ms": 1e3 * seconds[rival] if fits else None,
            "speedup": seconds[rival] / seconds[ours] if fits else None,
            "max_difference": differences.get(rival),
            "floor_ms": 1e3 * floor,
            "floor_fraction": floor / seconds[ours],
            **spent[ours],
            **{f"rival_{key}": value for key, value in spent.get(rival, {}).items()},
        }


def prepare(contender: Contender) -> tuple[Callable[[int], Any], dict[str, float]]:
    """A function of the round that runs the contender, and what it took to compile it.

    The latter is `compile_ms`, and `temporary_mb`, the most memory beside arguments and results.
    """
    if contender.on_host:
        return lambda _: contender.function(*contender.arguments), {}
    start = time.perf_counter()
    compiled = jax.jit(contender.function).lower(*contender.arguments).compile()
    spent = {
        "compile_ms": 1e3 * (time.perf_counter() - start),
        "temporary_mb": compiled.memory_analysis().temp_size_in_bytes / 1e6,
    }
    copies = 1
    if jax.default_backend() != "cpu":
        size = sum(x.nbytes for x in jax.tree.leaves(contender.arguments))
        copies = min(8, math.ceil(_ROTATED_BYTES / max(size, 1)))
    arguments = [jax.tree.map(jnp.copy, contender.arguments) for _ in range(copies)]
    return lambda n: compiled(*arguments[n % copies]), spent


def interleave(runs: dict[Any, Callable[[int], Any]]) -> dict[Any, float]:
    """Median seconds of each run, all taking turns."""

    def batch(run, size):
        start = time.perf_counter()
        jax.block_until_ready([run(n) for n in range(size)])
        return (time.perf_counter() - start) / size

    once = {label: batch(run, 1) for label, run in runs.items()}
    sizes = {
        label: min(_MAX_BATCH, math.ceil(_BATCH_SECONDS / seconds))
        for label, seconds in once.items()
    }
    round_seconds = sum(once[label] * sizes[label] for label in runs)
    budget = _SECONDS_PER_RUN * len(runs)
    rounds = min(_MAX_ROUNDS, max(3, int(budget / round_seconds)))
    times = {label: [] for label in runs}
    for _ in range(rounds):
        for label, run in runs.items():
            times[label].append(batch(run, sizes[label]))
    return {label: statistics.median(seconds) for label, seconds in times.items()}


def _difference(result, expected):
    """The largest between the leaves of two pytrees, however these are cut up."""
    flat = [
        np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(tree)])
        for tree in (result, expected)
    ]
    return float(np.abs(flat[0] - flat[1]).max(initial=0))


@functools.cache
def _bytes_per_second():
    """What a pass over 256 MB in place reads and writes in a second."""
    x = jnp.zeros(2**26, jnp.float32)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    times = []
    for _ in range(_MAX_ROUNDS):
        start = time.perf_counter()
        x = jax.block_until_ready(add(x))
        times.append(time.perf_counter() - start)
    return 2 * x.nbytes / statistics.median(times[1:])


@functools.cache
def _flops_per_second(dtype):
    """What a matrix product does in a second."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: x @ x)
    return 2 * size**3 / interleave({"product": lambda _: product(x)})["product"]


def value_and_gradients(function: Callable[..., jax.Array], *positions: int) -> Callable[..., Any]:
    """`function` with its gradients in the arguments at `positions`, for a cotangent of ones."""

    def run(*arguments):
        def of_floats(*floats):
            full = list(arguments)
            for position, value in zip(positions, floats, strict=True):
                full[position] = value
            return function(*full)

        out, vjp = jax.vjp(of_floats, *(arguments[position] for position in positions))
        return out, vjp(jnp.ones_like(out))

    return run


def main(*suites: Callable[[], Iterator[dict[str, Any] | str]]) -> None:
    """Runs suites as a command: a table for people, then one line of JSON.

    Args:
      *suites: functions that yield cases and statements.
    """
    out = flags.DEFINE_string("out", None, "File to write the JSON to, besides standard output.")
    _keep_memory()
    app.run(lambda _: _report(suites, out.value))


def _keep_memory():
    """Has the C library of Linux keep what is freed, in one heap; others have no such option."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        arena_max, mmap_max, trim_threshold = -8, -4, -1
        for option, value in ((arena_max, 1), (mmap_max, 0), (trim_threshold, -1)):
            libc.mallopt(option, value)


def _report(suites: Sequence[Callable[[], Iterator]], path: str | None) -> None:
    cases, statements = [], []
    print(
        f"{'case':44} {'ms':>9}  {'rival':28} {'ms':>9} {'speedup':>8} {'differs':>8} {'floor':>6}"
    )
    for suite in suites:
        for item in suite():
            if isinstance(item, str):
                statements.append(item)
                print(item, flush=True)
            else:
                cases.append(item)
                print(_line(item), flush=True)
    device = jax.devices()[0].device_kind
    cores = f", {os.cpu_count()} cores" if jax.default_backend() == "cpu" else ""
    report = {
        "date": datetime.date.today().isoformat(),
        "device": device + cores,
        "versions": {"jax": jax.__version__, "python": sys.version.split()[0]},
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "bytes_per_second": _bytes_per_second(),
        "cases": cases,
        "statements": statements,
    }
    text = json.dumps(report)
    if path:
        pathlib.Path(path).write_text(text + "\n")
    print(text)


def _line(case):
    def number(key, form):
        value = case[key]
        return "-" if value is None else format(value, form)

    return (
        f"{case['name']:44} {number('ms', '.3f'):>9}  {case['rival']:28} "
        f"{number('rival_ms', '.3f'):>9} {number('speedup', '.2f'):>7}x "
        f"{number('max_difference', '.0e'):>8} {number('floor_fraction', '.0%'):>6}"
    )
