"""From flags to a benchmark: what is wrong with them is one line, before anything is measured."""

import math
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags


def run(main: Callable[[list[str]], object], *, arguments: int | None = 0) -> None:
    """Runs a benchmark from the command line; to be called by a script that is `__main__`.

    Exit status 2 for flags that cannot be used, 1 for files that cannot, 130 for Ctrl-C: one line.

    Args:
      main: gets the arguments that are no flags, after the name of the script. It says what else is
        wrong with flags by an `app.UsageError`.
      arguments: how many there must be; any number where None.
    """

    def parse(argv):
        try:
            rest = flags.FLAGS(argv)
        except (flags.Error, ValueError) as error:  # absl raises either.
            _leave(error, 2)
        for name in flags.FLAGS:
            # Bounds do not keep it out.
            if isinstance(value := flags.FLAGS[name].value, float) and not math.isfinite(value):
                _leave(f"--{name}: got {value}, want a finite number", 2)
        if arguments is not None and len(rest) != 1 + arguments:
            _leave(f"got {rest[1:]}, want {arguments} arguments beside flags, see --help", 2)
        return rest

    def guarded(argv):
        try:
            main(argv)
        except app.UsageError as error:
            _leave(error, 2)
        except OSError as error:
            _leave(error, 1)
        except KeyboardInterrupt:
            _leave("interrupted", 130)

    app.run(guarded, flags_parser=parse)


def line() -> str:
    """The command that runs, with what XLA is told beside it."""
    options = [f"XLA_FLAGS={told}"] if (told := os.environ.get("XLA_FLAGS")) else []
    return " ".join([*options, "python", *sys.orig_argv[1:]])


def define_choices(name: str, choices: Sequence[str], help: str) -> None:
    """Defines a flag that takes some of the choices, all by default."""
    flags.DEFINE_list(name, list(choices), f"{help} Some of {','.join(choices)}.")
    flags.register_validator(
        name,
        lambda given: bool(given) and set(given) <= set(choices),
        f"want some of {','.join(choices)}",
    )


def define_numbers(
    name: str, default: Sequence[float] | None, help: str, *, kind: type, below: float
) -> None:
    """Defines a flag that takes numbers above 0 and below a bound, with commas between."""

    def right(given):
        try:
            return given is None or (given and all(0 < kind(number) < below for number in given))
        except ValueError:
            return False

    flags.DEFINE_list(name, default and [f"{number:g}" for number in default], help)
    what = "whole numbers" if kind is int else "numbers"
    flags.register_validator(name, right, f"want {what} above 0 and below {below:g}")


def check_file(name: str, path: str | None) -> pathlib.Path | None:
    """The file of a flag, of which it is known that it can be written; it is left as it was.

    Raises:
      app.UsageError: it cannot.
    """
    if path is None:
        return None
    file = pathlib.Path(os.path.expanduser(path))
    existed = file.exists()
    try:
        if existed and not file.is_file():
            raise OSError(f"{file} is not a file")
        with file.open("a"):
            pass
        if not existed:
            file.unlink()
    except (OSError, ValueError) as error:
        raise app.UsageError(f"--{name}: {error}") from error
    return file


def _leave(message: object, status: int) -> NoReturn:
    print(" ".join(str(message).split()), file=sys.stderr)
    sys.exit(status)
