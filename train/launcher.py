"""From a dataclass to a command: flags, a folder for the run, and a closing line of JSON."""

import contextlib
import dataclasses
import datetime
import itertools
import json
import operator
import os
import pathlib
import signal
import sys
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal, NoReturn

from absl import flags

from train.data import DataError

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

_Config = typing.TypeVar("_Config", bound="Config")


def flag(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A field of a config: the default and the help text of its flag, and what values it takes.

    Args:
      default: of the field.
      help: a sentence or two.
      minimum: the least value.
      above: a bound that no value reaches.
      below: another, from the other side.
    """
    for word, bound in (("Above", above), ("Below", below)):
        help = help if bound is None else f"{help} {word} {bound}."
    bounds = {"minimum": minimum, "above": above, "below": below}
    return dataclasses.field(default=default, metadata={"help": help, **bounds})


@dataclasses.dataclass(frozen=True)
class Config:
    """What every task can be told. Tasks add fields, each made with `flag`.

    A field is a bool, int, float, str or `Literal` of strings, or one of these `| None`. For rules
    that concern several fields, extend `__post_init__`: a `ValueError` that names the flag.

    Raises:
      ValueError: a field is out of its bounds, or NaN where there are any.
    """

    seed: int = flag(0, "Seed of everything random.", minimum=0, below=2**32)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for bound, words, holds in _BOUNDS:
                limit = field.metadata[bound]
                if None not in (value, limit) and not holds(value, limit):
                    raise ValueError(f"--{field.name} must be {words} {limit}, got {value}")


def launch(
    config_class: type[_Config],
    train_and_evaluate: Callable[[_Config, pathlib.Path], dict[str, Any]],
) -> None:
    """Runs a task from the command line; to be called by a script that is `__main__`.

    Makes the run's folder, writes `config.json` there, and prints the figures that
    `train_and_evaluate(config, workdir)` returns as the last line of standard output. What the
    user can mend is one line on standard error: exit status 2 for a wrong flag, 1 for data that
    cannot be used or a loss that is not finite, 130 for Ctrl-C.
    """
    # A text may hold what a terminal cannot show.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        config, workdir = _parse(config_class, sys.argv)
    except (flags.Error, ValueError) as error:
        _exit(error, 2)
    text = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
    try:
        workdir = _make_workdir(workdir, pathlib.Path(sys.argv[0]).stem)
        (workdir / "config.json").write_text(text)
    except OSError as error:
        _exit(f"--workdir: {error}", 2)
    try:
        with _leave_on_interrupt(f"interrupted; see {workdir}"):
            print(f"writing to {workdir}", flush=True)
            figures = train_and_evaluate(config, workdir)
    except (DataError, FloatingPointError) as error:
        _exit(error, 1)
    except KeyboardInterrupt as interrupt:
        _exit(f"{interrupt}; see {workdir}", 130)
    print(json.dumps(figures, default=lambda scalar: scalar.item()))


def _parse(config_class: type[_Config], argv: list[str]) -> tuple[_Config, str | None]:
    """Returns the config and the value of --workdir, or prints the help that was asked for."""
    values = flags.FlagValues()
    for field in dataclasses.fields(config_class):
        _define(field, typing.get_type_hints(config_class)[field.name], values)
    flags.DEFINE_string(
        "workdir",
        None,
        "New or empty folder for the run; by default a new one under runs/.",
        flag_values=values,
    )
    flags.DEFINE_bool("help", False, "Show this text.", short_name="h", flag_values=values)
    _, *rest = values(argv)
    if values.help:
        print(sys.modules["__main__"].__doc__, values.get_help(include_special_flags=False))
        sys.exit(0)
    if rest:
        raise flags.Error(f"unexpected argument {rest[0]!r}: flags are written --name=value")
    names = [field.name for field in dataclasses.fields(config_class)]
    return config_class(**{name: values[name].value for name in names}), values.workdir


def _define(field: dataclasses.Field, hint: Any, values: flags.FlagValues) -> None:
    if types.NoneType in typing.get_args(hint):
        (hint,) = set(typing.get_args(hint)) - {types.NoneType}
    minimum = field.metadata["minimum"]
    arguments = (field.name, field.default)
    help = field.metadata["help"]
    if typing.get_origin(hint) is Literal:
        flags.DEFINE_enum(*arguments, typing.get_args(hint), help, flag_values=values)
    elif minimum is not None:
        _DEFINE[hint](*arguments, help, lower_bound=minimum, flag_values=values)
    else:
        _DEFINE[hint](*arguments, help, flag_values=values)


def _make_workdir(workdir: str | None, task: str) -> pathlib.Path:
    """Makes the folder that the user asked for, or else a new one, also in a race."""
    if workdir is not None:
        path = pathlib.Path(workdir)
        path.mkdir(parents=True, exist_ok=True)
        # What a run leaves that ended before it began.
        if {entry.name for entry in path.iterdir()} - {"config.json"}:
            raise FileExistsError(f"{path} is not empty, want a new folder or an empty one")
        return path
    name = f"{task}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    for suffix in itertools.chain([""], (f"-{i}" for i in itertools.count(2))):
        with contextlib.suppress(FileExistsError):
            path = pathlib.Path("runs", name + suffix)
            path.mkdir(parents=True)
            return path


@contextlib.contextmanager
def _leave_on_interrupt(message: str) -> Iterator[None]:
    """Makes Ctrl-C leave at once, where the training loop does not defer it.

    Python's own way, an exception from anywhere, may be swallowed by a callback of JAX, and may
    crash the interpreter as it unwinds. All files are either whole or lines, so this loses nothing.
    """

    def leave(signum, frame):
        os.write(sys.stderr.fileno(), f"\n{message}\n".encode())
        os._exit(130)

    previous = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _exit(message: object, status: int) -> NoReturn:
    print(" ".join(str(message).split()), file=sys.stderr)
    sys.exit(status)
