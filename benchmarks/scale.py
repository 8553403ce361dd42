"""What a step of training a language model takes on TPUs that are not there.

Compiles the step of `python -m train.transformer`, as it would run, ahead of time for a topology,
and says what the compiler says: the memory of each chip, and what chips send one another.

  python -m benchmarks.scale --topology=v5e:4x4 --mesh=data:4,seq:4 --length=8192
  python -m benchmarks.scale --topology=v5e:4x4 --mesh=data:4,seq:4 --largest=length

Needs the extra `aot` and no accelerator. Compiling one step takes minutes.
"""

import collections
import functools
import math
import os
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import report
from train import devices, language, updates
from train.config import FlagError, make
from train.transformer_config import Config, make_model

_CORPUS_BYTES = 2**24
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}
_COLLECTIVE = re.compile(
    r"= (\S.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")


def chips(topology: str) -> list[Any]:
    """The chips of a TPU topology such as v5e:4x4.

    Raises:
      FlagError: there is no such topology, or no compiler for it.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        return topologies.get_topology_desc(topology, platform="tpu").devices
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError, NotImplementedError) as error:
        raise FlagError(f"--topology={topology}: {error}") from error


def measure(config: Config, mesh: Mesh) -> dict[str, Any]:
    """What a step takes: GiB on each chip, and MiB that each gets from others, by collective.

    `fits` is False, and there is no more than that, where the memory of a chip does not suffice.
    """
    model = nnx.eval_shape(lambda: make_model(config))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = language.make_optimizer(config)

    def whole(shape, dtype):
        sharding = NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    step, opt_state = whole((), jnp.int32), jax.eval_shape(optimizer.init, params)
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=devices.layout(mesh, x)),
        updates.State(step, params, rest, opt_state, None),
    )
    key = whole((), jax.random.key(0).dtype)
    loss = functools.partial(language.loss_fn, config)
    many = updates.make_updates(graphdef, optimizer, loss, None)
    traced = updates.traced(many, mesh, state, key, whole((_CORPUS_BYTES,), jnp.uint8))
    row = {"parameters": devices.num_bytes(params) // 4, "fits": True}
    began = time.perf_counter()
    try:
        with devices.use(mesh):
            compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return row | {"fits": False}
    sizes = compiled.memory_analysis()
    return row | {
        "state_gib": round(sizes.argument_size_in_bytes / 2**30, 3),
        "step_gib": round(sizes.temp_size_in_bytes / 2**30, 3),
        **communication(compiled.as_text()),
        "compile_seconds": round(time.perf_counter() - began),
    }


def communication(program: str) -> dict[str, float]:
    """How often each collective is in a compiled program, and MiB of its results, on each chip."""
    counts, sizes = collections.Counter(), collections.Counter()
    for line in program.splitlines():
        if (found := _COLLECTIVE.search(line)) is None:
            continue
        kind, name, starts = found.groups()
        arrays = [
            _BYTES.get(dtype, 4) * math.prod(map(int, filter(None, shape.split(","))))
            for dtype, shape in _ARRAY.findall(kind)
        ]
        # What only begins has operands and results, or, of the sum of many arrays, results alone.
        counts[name] += 1
        sizes[name] += max(arrays) if starts and name != "all-reduce" else sum(arrays)
    return {
        f"{name.replace('-', '_')}s": [counts[name], round(sizes[name] / 2**20, 2)]
        for name in sorted(counts)
    }


def _config(**changes: Any) -> Config:
    """The config of the flags, and what is changed of it."""
    values = flags.FLAGS
    names = ("layers", "features", "length", "batch_size")
    given = {name: values[name].value for name in names} | {"mesh": values.mesh} | changes
    return make(
        Config,
        given | {"num_heads": max(1, given["features"] // 64), "bfloat16": True},
    )


def _row(config: Config, mesh: Mesh) -> dict[str, Any]:
    sizes = f"{config.layers} features {config.features} length {config.length}"
    found = measure(config, mesh)
    name = f"{flags.FLAGS.topology} {config.mesh} batch {config.batch_size} {sizes}"
    return {"name": name, "ok": True, **found}


def cases(small: bool):
    """The step of the flags, and, of what is to be largest, of twice as much until none fits."""
    del small
    values = flags.FLAGS
    try:
        config = _config()
        mesh = devices.make_mesh(config.mesh_shape(), config.batch_size, chips(values.topology))
    except FlagError as error:
        raise app.UsageError(str(error)) from error
    row = _row(config, mesh)
    yield row
    while values.largest and row["fits"]:
        config = _config(**{values.largest: 2 * getattr(config, values.largest)})
        row = _row(config, mesh)
        yield row


if __name__ == "__main__":
    flags.DEFINE_string("topology", "v5e:4x4", "Of TPUs, as libtpu names it.")
    flags.DEFINE_string("mesh", "data:4,seq:4", "See `python -m train.transformer --help`.")
    flags.DEFINE_string("layers", "wwwl", "Of train.transformer.")
    flags.DEFINE_integer("features", 512, "Of train.transformer; a head has 64.", lower_bound=1)
    flags.DEFINE_integer("length", 4096, "Of train.transformer.", lower_bound=2)
    flags.DEFINE_integer("batch_size", 16, "Of train.transformer.", lower_bound=1)
    flags.DEFINE_enum("largest", None, ["length", "features", "batch_size"], "Doubles it.")
    report.main(scale=cases)
