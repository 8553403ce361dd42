"""What a run can be told: a frozen dataclass, and how the command line becomes one."""

import dataclasses
import math
import operator
import re
import sys
import types
import typing
from collections.abc import Callable, Container, Iterator
from typing import Any, ClassVar, Literal

from absl import flags

flags.disclaim_key_flags()

_DEFINE = {
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
}

_BOUNDS = (
    ("minimum", "at least", operator.ge),
    ("above", "above", operator.gt),
    ("below", "below", operator.lt),
)
DISTRIBUTED = re.compile(r"auto|[^,]+:\d+,[1-9]\d*,\d+")
_SECONDS = {"s": 1, "m": 60, "h": 3600}

Implementation = Literal["reference", "cpu", "mosaic_gpu", "triton", "tpu"]


Only = Container | Callable[[Any], Any]


class FlagError(ValueError):
    """A flag that cannot be used; the message is one line that names it."""


def flag(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    only: dict[str, Only] | None = None,
    fixed: bool = True,
) -> Any:
    """A field of a config: the default and the help text of its flag, and what values it takes.

    Args:
      default: of the field, or a function that makes it of the config, of which it may read the
        fields before this one.
      help: a sentence or two; says also what a function makes.
      minimum: the least value.
      above: a bound that no value reaches.
      below: another, from the other side.
      only: names of other fields, and the values of these with which this one has an effect, or a
        function that tells (`bool`: all but 0). With any other, it must be left at its default.
      fixed: whether a run that is continued must keep it.
    """
    for word, bound in (("Above", above), ("Below", below)):
        help = help if bound is None else f"{help} {word} {bound}."
    bounds = {"minimum": minimum, "above": above, "below": below}
    metadata = {"help": help, **bounds, "only": only or {}, "fixed": fixed}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Config:
    """What every task can be told. Tasks add fields, each made with `flag`, `steps` among them.

    A field is a bool, int, float, str or `Literal` of strings, or one of these `| None`. For rules
    that concern several fields, extend `__post_init__`: a `ValueError` that names the flag.

    Raises:
      ValueError: fields are out of their bounds, not finite, too large to count, or without effect;
        names all of them.
    """

    # Whether examples are sequences that `--mesh` can divide.
    has_sequences: ClassVar[bool] = False
    # With which other flags `--implementation` has an effect, like `only` of `flag`.
    kernels_only: ClassVar[dict[str, Only]] = {}

    seed: int = flag(0, "Seed of everything random.", minimum=0, below=2**32)
    mode: Literal["train", "eval"] = flag(
        "train",
        "eval: no more training, only figures and pictures of the last checkpoint in --workdir.",
        fixed=False,
    )
    checkpoint_every: str = flag(
        "5m", "Steps between checkpoints, or time: 500, 30s, 5m, 1h.", fixed=False
    )
    keep: int = flag(2, "Checkpoints that are kept, beside the best.", minimum=1, fixed=False)
    implementation: Implementation | None = flag(
        None, "Backend of the kernels; by default what is best on the device.", fixed=False
    )
    mesh: str | None = flag(
        None,
        "Devices to share the work, such as data:4 (batches), data:2,model:2 (large parameters as "
        "well) or data:2,seq:2 (sequences, where there are any); by default all for data, if the "
        "batch divides.",
        fixed=False,
    )
    distributed: str | None = flag(
        None,
        "For a run of several processes: auto, where SLURM, Kubernetes or a TPU pod started them, "
        "or HOST:PORT,N,I for process I of N. All are given the same --workdir.",
        fixed=False,
    )
    profile: bool = flag(False, "Writes a trace of some steps to WORKDIR/profile.", fixed=False)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if callable(getattr(self, field.name)):
                object.__setattr__(self, field.name, self._default(field))
        problems = list(self._problems())
        if problems:
            raise ValueError("; ".join(problems))

    def _default(self, field: dataclasses.Field) -> Any:
        return field.default(self) if callable(field.default) else field.default

    def _problems(self) -> Iterator[str]:
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            for bound, words, holds in _BOUNDS:
                limit = field.metadata[bound]
                if None not in (value, limit) and not holds(value, limit):
                    yield f"--{name} must be {words} {limit}, got {value}"
            if isinstance(value, float) and not math.isfinite(value):
                yield f"--{name} must be finite, got {value}"
            if isinstance(value, int) and field.metadata["below"] is None and value >= 2**31:
                yield f"--{name} must be below {2**31}, got {value}"
            only = self.kernels_only if name == "implementation" else field.metadata["only"]
            for other, wanted in only.items():
                there = getattr(self, other)
                works = wanted(there) if callable(wanted) else there in wanted
                if not works and value != self._default(field):
                    yield f"--{name} has no effect with --{other}={there}"
        if not re.fullmatch(r"0*[1-9]\d*[smh]?", self.checkpoint_every):
            yield (
                "--checkpoint_every must be a number of steps, or a time such as 30s, 5m or 1h, "
                f"got {self.checkpoint_every!r}"
            )
        if self.mesh is not None:
            yield from self._mesh_problems()
        if self.distributed is not None and not DISTRIBUTED.fullmatch(self.distributed):
            yield f"--distributed must be auto or HOST:PORT,N,I, got {self.distributed!r}"

    def _mesh_problems(self) -> Iterator[str]:
        parts = [re.fullmatch(r"(data|model|seq):[1-9]\d{0,5}", x) for x in self.mesh.split(",")]
        axes = [part and part[1] for part in parts]
        if None in axes or len(set(axes)) < len(axes):
            yield (
                "--mesh must be like data:4, data:2,model:2 or data:2,seq:2, each axis once, "
                f"got {self.mesh!r}"
            )
        elif "seq" in axes and not self.has_sequences:
            yield f"--mesh: there are no sequences to divide in this task, got {self.mesh!r}"

    def mesh_shape(self) -> dict[str, int] | None:
        """What `--mesh` says: the size of each axis that it names."""
        if self.mesh is None:
            return None
        return {axis: int(size) for axis, size in (x.split(":") for x in self.mesh.split(","))}

    def checkpoint_interval(self) -> tuple[float, float]:
        """What `--checkpoint_every` says: a number of steps and one of seconds, one infinite."""
        number, unit = re.fullmatch(r"(\d+)(\D?)", self.checkpoint_every).groups()
        return (math.inf, float(number) * _SECONDS[unit]) if unit else (float(number), math.inf)


class Request(typing.NamedTuple):
    """A command line, read: the fields that it gives values to, and the folder of the run."""

    given: dict[str, Any]
    workdir: str | None


def parse(config_class: type[Config], argv: list[str]) -> Request:
    """Reads a command line, or prints the help that it asks for and exits.

    Raises:
      FlagError: flags are unknown or of the wrong type; names all of them.
    """
    values = flags.FlagValues()
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        _define(field, hints[field.name], values)
    flags.DEFINE_string(
        "workdir",
        None,
        "Folder of the run, new, empty, or of a run to continue; by default a new one under runs/.",
        flag_values=values,
    )
    flags.DEFINE_bool("help", False, "Show this text.", short_name="h", flag_values=values)
    problems = []
    for argument in _joined(argv[1:], values):
        try:
            _, *rest = values([argv[0], argument])
            problems += [f"unexpected argument {a!r}: flags are written --name=value" for a in rest]
        except (flags.Error, ValueError) as error:  # absl raises either.
            problems.append(str(error))
    values.mark_as_parsed()
    if values.help:
        print(sys.modules["__main__"].__doc__, values.get_help(include_special_flags=False))
        sys.exit(0)
    given = {name: values[name].value for name in hints if name in values and values[name].present}
    if problems:
        # What is wrong with the other flags is said in the same breath.
        try:
            config_class(**given)
        except ValueError as error:
            problems.append(str(error))
        raise FlagError("; ".join(problems))
    return Request(given, values.workdir)


def make(config_class: type[Config], values: dict[str, Any]) -> Config:
    """Makes a config.

    Raises:
      FlagError: instead of the config's own ValueError.
    """
    try:
        return config_class(**values)
    except ValueError as error:
        raise FlagError(error) from error


def _joined(arguments: list[str], values: flags.FlagValues) -> Iterator[str]:
    """Arguments one by one, `--name value` as `--name=value`."""
    rest = iter(arguments)
    for argument in rest:
        name = argument.lstrip("-")
        wants_value = argument.startswith("-") and name in values and not values[name].boolean
        value = next(rest, None) if wants_value else None
        yield argument if value is None else f"{argument}={value}"


def _define(field: dataclasses.Field, hint: Any, values: flags.FlagValues) -> None:
    if types.NoneType in typing.get_args(hint):
        (hint,) = set(typing.get_args(hint)) - {types.NoneType}
    minimum = field.metadata["minimum"]
    arguments = (field.name, None if callable(field.default) else field.default)
    help = field.metadata["help"]
    if typing.get_origin(hint) is Literal:
        flags.DEFINE_enum(*arguments, typing.get_args(hint), help, flag_values=values)
    elif minimum is not None:
        _DEFINE[hint](*arguments, help, lower_bound=minimum, flag_values=values)
    else:
        _DEFINE[hint](*arguments, help, flag_values=values)
