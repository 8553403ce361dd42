"""How every benchmark measures: rivals in turn in one process, medians, a floor.

Every case states the time that the device would need at least, its floor: the bytes and operations
that the case cannot avoid, over the rates that a pass over memory and a matrix product reach here.
On a GPU it also states what CUPTI counts: the kernels of one call and the sum of their times.

A kernel may become a default by a rule, and every row says whether a contender that is a backend by
name passes it there: relative errors below 1e-2 in bfloat16 and 1e-5 in float32, the same bits in
eleven runs (unless it is known to add in any order), and faster than plain JAX.
"""

import concurrent.futures
import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import profiler

from benchmarks import accuracy
from benchmarks.accuracy import agreement, agrees, difference
from benchmarks.contenders import PLAIN, Contender

_BATCH_SECONDS = 0.005
_MAX_BATCH = 20
# More than the last cache of any GPU: inputs rotate through this many bytes there.
_ROTATED_BYTES = 2**28
_LONGEST = 8
# A pass over so many bytes tells the rate of the memory.
_pass_bytes = 2**28
_max_rounds = 15
_deadline = math.inf


class OutOfTimeError(Exception):
    """Raised where a case would begin after the deadline."""


def end_after(seconds: float) -> None:
    """Sets the deadline, after which `begin` raises an OutOfTimeError."""
    global _deadline  # noqa: PLW0603
    _deadline = time.monotonic() + seconds


def only_try() -> None:
    """From here on nothing is measured longer than it takes to see that it can be."""
    global _max_rounds, _pass_bytes
    _max_rounds, _pass_bytes = 1, 2**16
    accuracy.only_try()


def begin() -> None:
    """Called at the beginning of every case: what began is measured to its end."""
    if time.monotonic() > _deadline:
        raise OutOfTimeError


def compare(
    name: str,
    contenders: dict[str, Contender],
    *,
    expected: Callable[[], Any] | None = None,
    nbytes: int | None = None,
    flops: int = 0,
    prepared: dict[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """Times the first contender against each of the others.

    Args:
      name: of the case.
      contenders: by name. One that fails is reported with its error.
      expected: makes what the first should give, and all that compute the `same`.
      nbytes: read and written at least; by default the arguments and results of the first.
      flops: done at least.
      prepared: what `prepare` returns of the contenders; by default they are prepared here.

    Yields:
      A case for each rival: times in ms (medians), compilation, temporary memory, errors, kernels.
      What is known of the rival bears the prefix `rival_`.
    """
    begin()
    prepared = prepare(contenders) if prepared is None else prepared
    runs, results, spent, programs = _first_runs(prepared)
    ours, *rivals = contenders
    if ours not in results:
        yield {"name": name, "rival": None, **dict.fromkeys(_FIGURES), **spent[ours]}
        return
    wanted = None
    if expected is not None:
        try:
            wanted = jax.block_until_ready(expected())
        except jax.errors.JaxRuntimeError as error:  # It may not fit where contenders do.
            spent[ours]["expected_error"] = str(error)[:300]
    for label, result in results.items():
        if contenders[label].same and not contenders[label].on_host:
            spent[label] |= agreement(runs[label], result, wanted)
    if wanted is None:
        differences = {
            label: difference(results[ours], result)
            for label, result in results.items()
            if contenders[label].same and label != ours
        }
    else:
        differences = dict.fromkeys(contenders, difference(results[ours], wanted))
    dtype = jax.tree.leaves(results[ours])[0].dtype.name
    arrays = jax.tree.leaves((contenders[ours].arguments, results[ours]))
    nbytes = sum(x.nbytes for x in arrays) if nbytes is None else nbytes
    del arrays, wanted
    results.clear()

    # A program that is the same as an earlier one takes its time.
    twins = {
        label: next(twin for twin, other in programs.items() if other[0] is text)
        for label, (text, _, _) in programs.items()
    }
    seconds = interleave({label: run for label, run in runs.items() if twins[label] == label})
    seconds = {label: seconds[twin] for label, twin in twins.items()}
    for label in seconds:
        spent[label] |= kernel_times(*programs[label][1:])
    plain = [seconds[label] for label in seconds if contenders[label].implementation in PLAIN]
    floor = nbytes / bytes_per_second()
    if flops:
        floor = max(floor, flops / _flops_per_second(dtype))
    for rival in rivals:
        fits = rival in seconds
        row = {
            "name": name,
            "ms": 1e3 * seconds[ours],
            "rival": rival,
            "rival_ms": 1e3 * seconds[rival] if fits else None,
            "speedup": seconds[rival] / seconds[ours] if fits else None,
            "max_difference": differences.get(rival),
            "floor_ms": 1e3 * floor,
            "floor_fraction": floor / seconds[ours],
            **spent[ours],
            **{f"rival_{key}": value for key, value in spent[rival].items()},
            "device_peak_mb": peak_mb(),
        }
        implementation = contenders[rival].implementation
        if implementation not in (None, *PLAIN) and fits and plain:
            agreed = agrees(spent[rival], dtype, implementation)
            row["rival_passes"] = agreed and seconds[rival] < plain[0]
        yield row


def compare_all(cases: dict[str, tuple[dict[str, Contender], dict[str, Any]]]) -> Iterator:
    """`compare` of several cases by name, each contenders and keywords.

    All programs are compiled side by side first, but on a CPU, where each case has the memory to
    itself.
    """
    begin()
    prepared = {}
    if jax.default_backend() != "cpu":
        every = {name: contenders for name, (contenders, _) in cases.items()}
        flat = {(name, label): each for name in every for label, each in every[name].items()}
        ready = prepare(flat)
        prepared = {name: {label: ready[name, label] for label in every[name]} for name in every}
    for name, (contenders, options) in cases.items():
        yield from compare(name, contenders, **options, prepared=prepared.pop(name, None))


def _first_runs(every):
    """Of each contender by label: its run, first result, what it took, and its program.

    One that fails has only its error, in the third."""
    runs, results, spent, programs = {}, {}, {}, {}
    for label, prepared in every.items():
        try:
            if isinstance(prepared, Exception):
                raise prepared
            runs[label], spent[label], programs[label] = prepared
            results[label] = jax.block_until_ready(runs[label](0))
        except Exception as error:  # Whatever it is, the others go on.
            runs.pop(label, None)
            programs.pop(label, None)
            spent[label] = {"error": f"{type(error).__name__}: {error}"[:300]}
    return runs, results, spent, programs


_FIGURES = ("ms", "rival_ms", "speedup", "max_difference", "floor_ms", "floor_fraction")


def prepare(contenders: dict[Any, Contender]) -> dict[Any, tuple[Any, Any, Any] | Exception]:
    """Traces contenders one by one, and compiles each program once: side by side, but on a CPU.

    Returns:
      Of each contender what went wrong, or a function of the round that runs it; `compile_ms` and
      `temporary_mb`, the most memory that it needs beside arguments and results; its text, the
      compiled program and its arguments.
    """
    workers = 1 if jax.default_backend() == "cpu" else os.cpu_count()
    compiling, traced = {}, {}
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for label, contender in contenders.items():
            if contender.on_host:
                continue
            start = time.perf_counter()
            try:
                lowered = jax.jit(contender.function).lower(*contender.arguments)
                text = lowered.as_text()
            except Exception as error:  # Whatever it is, the others go on.
                traced[label] = error
                continue
            traced[label] = time.perf_counter() - start, text
            if text not in compiling:
                compiling[text] = text, pool.submit(_compile, lowered)
    return {
        label: _prepared(contender, compiling, traced.get(label))
        for label, contender in contenders.items()
    }


def _compile(lowered):
    start = time.perf_counter()
    return lowered.compile(), time.perf_counter() - start


def _prepared(contender, compiling, traced):
    """An item of what `prepare` returns."""
    if contender.on_host:
        return lambda _: contender.function(*contender.arguments), {}, (object(), None, None)
    if isinstance(traced, Exception):
        return traced
    seconds, text = traced
    text, future = compiling[text]
    if error := future.exception():
        return error
    compiled, compile_seconds = future.result()
    spent = {
        "compile_ms": 1e3 * (seconds + compile_seconds),
        "temporary_mb": compiled.memory_analysis().temp_size_in_bytes / 1e6,
    }
    copies = 1
    if jax.default_backend() != "cpu":
        size = sum(x.nbytes for x in jax.tree.leaves(contender.arguments))
        copies = min(8, math.ceil(_ROTATED_BYTES / max(size, 1)))
    arguments = [jax.tree.map(jnp.copy, contender.arguments) for _ in range(copies)]
    program = (text, compiled, arguments[0])
    return lambda n: compiled(*arguments[n % copies]), spent, program


def kernel_times(compiled: Any, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """What CUPTI counts on a GPU: `kernel_ms`, `kernels` in one call, and the `longest` by name."""
    if compiled is None or jax.default_backend() != "gpu":
        return {}
    try:
        _, each = profiler.measure(compiled, aggregate=False)(*arguments)
    except Exception as error:  # Another tool may hold CUPTI: the wall times are worth their row.
        return {"kernel_error": f"{type(error).__name__}: {error}"[:160]}
    sums = {}
    for kernel, ms in each or ():
        count, total = sums.get(kernel[:60], (0, 0.0))
        sums[kernel[:60]] = count + 1, total + ms
    longest = sorted(sums.items(), key=lambda item: -item[1][1])[:_LONGEST]
    return {
        "kernel_ms": sum(total for _, total in sums.values()),
        "kernels": sum(count for count, _ in sums.values()),
        "longest": {kernel: [count, round(total, 4)] for kernel, (count, total) in longest},
    }


def peak_mb() -> float | None:
    """The most memory of the device that this process has held so far; None where nobody counts."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats["peak_bytes_in_use"] / 1e6 if "peak_bytes_in_use" in stats else None


def interleave(runs: dict[Any, Callable[[int], Any]]) -> dict[Any, float]:
    """Median seconds of each run, all taking turns."""

    def batch(run, size):
        start = time.perf_counter()
        jax.block_until_ready([run(n) for n in range(size)])
        return (time.perf_counter() - start) / size

    once = {label: batch(run, 1) for label, run in runs.items()}
    if _max_rounds == 1:
        return once
    sizes = {
        label: min(_MAX_BATCH, math.ceil(_BATCH_SECONDS / seconds))
        for label, seconds in once.items()
    }
    round_seconds = sum(once[label] * sizes[label] for label in runs)
    budget = (2 if jax.default_backend() == "cpu" else 0.6) * len(runs)
    rounds = min(_max_rounds, max(3, int(budget / round_seconds)))
    times = {label: [] for label in runs}
    for _ in range(rounds):
        for label, run in runs.items():
            times[label].append(batch(run, sizes[label]))
    return {label: statistics.median(seconds) for label, seconds in times.items()}


@functools.cache
def bytes_per_second():
    """What a pass over 256 MB in place reads and writes in a second."""
    x = jnp.zeros(_pass_bytes // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    times = []
    for _ in range(1 + _max_rounds):
        start = time.perf_counter()
        x = jax.block_until_ready(add(x))
        times.append(time.perf_counter() - start)
    return 2 * x.nbytes / statistics.median(times[1:])


@functools.cache
def _flops_per_second(dtype):
    """What a matrix product does in a second."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: x @ x)
    return 2 * size**3 / interleave({"product": lambda _: product(x)})["product"]
