"""Which devices share the work of a run, and whether it fits on them."""

import contextlib
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from train import checkpoints
from train.config import FlagError

_AXES = ("data", "model", "seq")
# Arrays with fewer entries are not worth to be divided over `model`.
_LARGE = 2**14


def join(distributed: str) -> None:
    """Makes this process one of several, as `--distributed` says; before any device is used.

    Raises:
      FlagError: the others cannot be found.
    """
    where, *numbers = distributed.split(",")
    arguments = () if where == "auto" else (where, *map(int, numbers))
    try:
        jax.distributed.initialize(*arguments)
    except (ValueError, RuntimeError) as error:
        raise FlagError(f"--distributed={distributed}: {error}") from error


def make_mesh(
    shape: dict[str, int] | None, batch_size: int | None, devices: Sequence[Any] | None = None
) -> jax.sharding.Mesh:
    """The mesh of `--mesh`, with axes `data`, `model` and `seq`, of all hosts.

    Args:
      shape: sizes by axis, those that are missing are 1; None for all devices on `data` if that
        divides the batch, and one otherwise.
      batch_size: examples in an update.
      devices: to take them from; those that there are where None.

    Raises:
      FlagError: there are fewer devices, or the batch is not divided by `data`.
    """
    devices = jax.devices() if devices is None else devices
    if shape is None:
        divides = batch_size is not None and batch_size % len(devices) == 0
        shape = {"data": len(devices) if divides or jax.process_count() > 1 else 1}
    sizes = tuple(shape.get(axis, 1) for axis in _AXES)
    count = math.prod(sizes)
    if count > len(devices):
        raise FlagError(f"--mesh: want {count} devices, have {len(devices)}")
    if count < len(devices) and jax.process_count() > 1:
        raise FlagError(f"--mesh: several processes need all {len(devices)} devices, got {count}")
    if sizes[0] > 1 and (batch_size is None or batch_size % sizes[0]):
        raise FlagError(f"--mesh: {sizes[0]} devices do not divide a batch of {batch_size}")
    array = np.array(devices[:count]).reshape(sizes)
    return jax.sharding.Mesh(array, _AXES, axis_types=(AxisType.Auto,) * len(_AXES))


def layout(mesh: jax.sharding.Mesh, x: Any) -> NamedSharding:
    """How an array is put on a mesh: the same everywhere, but for what is large.

    An array of two axes or more that has many entries is divided over `model`, along the longest
    axis that can be. Parameters and what an optimizer knows of each have the same shapes, so they
    are divided alike.
    """
    size, spec = mesh.shape["model"], [None] * x.ndim
    by_length = sorted(range(x.ndim), key=lambda axis: -x.shape[axis])
    divisible = [axis for axis in by_length if x.shape[axis] % size == 0]
    if size > 1 and x.ndim > 1 and x.size >= _LARGE and divisible:
        spec[divisible[0]] = "model"
    return NamedSharding(mesh, PartitionSpec(*spec))


def place(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """Puts a tree of arrays on a mesh, each in its `layout`."""
    return jax.tree.map(lambda x: _put(x, layout(mesh, x)), tree)


def replicate(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """Puts all of a tree of arrays on every device of a mesh."""
    return jax.tree.map(lambda x: _put(x, NamedSharding(mesh, PartitionSpec())), tree)


def _put(x, sharding):
    if jax.process_count() == 1:
        return jax.device_put(x, sharding)
    # Every process has the whole, and puts its part.
    if checkpoints.is_key(x):
        data = jax.device_put(np.asarray(jax.random.key_data(x)), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    return jax.device_put(np.asarray(x), sharding)


def gather(tree: Any) -> Any:
    """A tree of arrays, wherever they are, on the first device of this process; all are copies."""
    device = jax.local_devices()[0]

    def fetch(x):
        if x.is_fully_addressable:
            return jnp.copy(jax.device_put(x, device))
        if x.is_fully_replicated:
            return jnp.copy(jax.device_put(x.addressable_data(0), device))
        return jax.device_put(checkpoints.to_host(x), device)

    return jax.tree.map(fetch, tree)


def use(mesh: jax.sharding.Mesh) -> contextlib.AbstractContextManager:
    """Within, `shard` means this mesh, if it has more than one device."""
    return jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext()


def shard(tree: Any) -> Any:
    """Within a loss: divides the first axis of arrays, that of examples, over `data`."""
    return _constrain(tree, "data")


def shard_sequences(tree: Any) -> Any:
    """Within a loss: divides the first axis of arrays over `data`, the second over `seq`."""
    return _constrain(tree, "data", "seq")


def _constrain(tree, *axes):
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.shape[axis] for axis in axes) == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, PartitionSpec(*axes))


def agree(flag: bool) -> bool:
    """Whether any process says so; to be called by all of them."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def check_fits(what: str, num_bytes: float) -> None:
    """Refuses what would take more memory than there is.

    Raises:
      FlagError: it does.
    """
    available = available_bytes()
    if num_bytes > available:
        wanted, there = (f"{count / 2**30:.3g} GiB" for count in (num_bytes, available))
        raise FlagError(f"{what} would take {wanted} of memory, there are {there}")


def available_bytes() -> float:
    """Memory of the first device, or, where that is the host, what can be had of the host's."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit", math.inf)
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, ValueError):
        limits.append(int(pathlib.Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits)


def num_bytes(tree: Any) -> int:
    """What a tree of arrays, or of their shapes, takes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def largest(jaxpr: Any) -> tuple[int, str]:
    """Bytes and shape of the largest array in a traced computation."""
    most = (0, "")
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            aval = variable.aval
            if hasattr(aval, "shape"):
                size = math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 4)
                most = max(most, (size, aval.str_short()))
        for inner in jaxprs_in_params(equation.params):
            most = max(most, largest(inner))
    return most
