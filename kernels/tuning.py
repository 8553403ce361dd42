"""Block sizes of the GPU kernels: those measured on a device, or a rule where none were."""

from typing import NamedTuple

import jax

from . import tuned


class Config(NamedTuple):
    """How a kernel divides its work; all sizes but `stages` are powers of 2.

    tile: elements of the gathered operand that a program holds at once.
    entries: the most entries of a row among them (for `redistribute`, tuples).
    features: the most features of an entry among them.
    warps: of 32 threads each, in a program.
    stages: loop iterations whose loads are in flight.
    """

    tile: int
    entries: int
    features: int
    warps: int
    stages: int


# 16 elements for each of 128 threads: four vector loads of float32 in flight, and room for as
# many programs as hide their latency.
RULE = Config(tile=2048, entries=16, features=128, warps=4, stages=2)


def shape_class(entries, features):
    """Sizes with one choice in common: each is rounded up to a power of 4."""
    return tuple(4 ** (max(size - 1, 0).bit_length() + 1 >> 1) for size in (entries, features))


def choose(kernel, entries, features):
    """The `Config` of a kernel for so many entries in a row, of so many features."""
    table = tuned.TABLE.get(jax.devices()[0].device_kind, {})
    return Config(*table.get((kernel, *shape_class(entries, features)), RULE))
