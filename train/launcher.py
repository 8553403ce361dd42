"""From a dataclass to a command: flags, a folder for the run, and a closing line of JSON."""

import contextlib
import datetime
import os
import pathlib
import sys
import typing
from collections.abc import Callable
from typing import Any, NoReturn

import jax

from train import devices, runs
from train.checkpoints import CheckpointError
from train.config import DISTRIBUTED, Config, FlagError, flag, make, parse
from train.data import DataError
from train.process import Interrupted, leave_on_signals, outlive_streams

__all__ = ["Config", "flag", "launch"]

# What is left where a run was killed before it began.
_BEFORE_A_RUN = {".lock", ".model.json", "model.json", ".config.json"}

_Config = typing.TypeVar("_Config", bound=Config)


def launch(
    config_class: type[_Config],
    train_and_evaluate: Callable[[_Config, pathlib.Path], dict[str, Any]],
) -> None:
    """Runs a task from the command line; to be called by a script that is `__main__`.

    Prints the figures that `train_and_evaluate(config, workdir)` returns as the last line of
    standard output. In the folder of a run, it continues that run: flags that are not given are
    those of the run. What the user can mend is one line on standard error: exit status 2 for a
    wrong flag, 1 for data that cannot be used, a figure that is not finite or a file that cannot be
    written, and 128 and the number of a signal (130 for Ctrl-C).
    """
    outlive_streams()
    with runs.session(), contextlib.ExitStack() as stack:
        try:
            request = parse(config_class, sys.argv)
            _join(request.given.get("distributed"), request.workdir)
            workdir = _workdir(request.workdir, pathlib.Path(sys.argv[0]).stem)
            config = _config(config_class, request.given, workdir)
            if (workdir / ".lock").exists():
                stack.enter_context(runs.owned(workdir))
            stack.enter_context(leave_on_signals(workdir))
            figures = train_and_evaluate(config, workdir)
        except (FlagError, NotImplementedError) as error:
            _exit(error, 2)
        except (DataError, FloatingPointError, CheckpointError) as error:
            _exit(error, 1)
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXH" not in str(error):
                raise
            _exit(f"out of memory: {str(error)[:200]}; see {workdir}", 1)
        except OSError as error:
            _exit(f"{error}; see {workdir}", 1)
        except runs.PicturesError as error:
            print(runs.to_json(error.figures), flush=True)
            _exit(error, 1)
        except Interrupted as interrupt:
            _exit(f"{interrupt}; see {workdir}", 128 + interrupt.signum)
        print(runs.to_json(figures), flush=True)


def _join(distributed: str | None, workdir: str | None) -> None:
    """Makes this process one of several, if it is asked to."""
    if distributed is None or not DISTRIBUTED.fullmatch(distributed):
        return
    if workdir is None:
        raise FlagError("--distributed needs --workdir, the same for all processes")
    devices.join(distributed)
    if jax.process_index() > 0:
        # One voice is enough.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _config(config_class: type[_Config], given: dict[str, Any], workdir: pathlib.Path) -> _Config:
    """The config of the flags that are given, and otherwise of the run in the folder, if any."""
    if not runs.is_run(workdir):
        config = make(config_class, given)
        if config.mode == "eval":
            raise FlagError(f"--mode=eval needs --workdir, the folder of a run, got {workdir}")
        return config
    values = runs.read_config(workdir, config_class)
    config = make(config_class, values | {"mode": "train"} | given)
    problems = runs.differences(config, values)
    if problems:
        raise FlagError(f"--workdir: {workdir} has another run: {', '.join(problems)}")
    return config


def _workdir(workdir: str | None, task: str) -> pathlib.Path:
    """The folder that the user asked for, or a new one, which is not made yet."""
    if workdir is None:
        return pathlib.Path("runs", f"{task}-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}")
    if "://" in workdir:
        raise FlagError(f"--workdir must be a folder of this machine, got {workdir}")
    try:
        path = pathlib.Path(workdir).expanduser()
        if path.exists() and not runs.is_run(path):
            if {entry.name for entry in path.iterdir()} - _BEFORE_A_RUN:
                raise FileExistsError(f"{path} is not empty, and not the folder of a run")
            if not os.access(path, os.W_OK):
                raise PermissionError(f"{path} cannot be written to")
    except (OSError, RuntimeError, ValueError) as error:
        raise FlagError(f"--workdir: {error}") from error
    return path


def _exit(message: object, status: int) -> NoReturn:
    print(" ".join(str(message).split()), file=sys.stderr)
    sys.exit(status)
