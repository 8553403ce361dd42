"""From a dataclass to a command: flags, a folder for the run, and a closing line of JSON."""

import contextlib
import datetime
import io
import os
import pathlib
import signal
import sys
import threading
import typing
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from train import runs
from train.checkpoints import CheckpointError
from train.config import Config, FlagError, flag, make, parse
from train.data import DataError
from train.loop import SIGNALS, Interrupted

__all__ = ["Config", "flag", "launch"]

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
    _outlive_streams()
    with runs.session(), contextlib.ExitStack() as stack:
        try:
            request = parse(config_class, sys.argv)
            workdir = _workdir(request.workdir, pathlib.Path(sys.argv[0]).stem)
            config = _config(config_class, request.given, workdir)
            if (workdir / ".lock").exists():
                stack.enter_context(runs.owned(workdir))
            stack.enter_context(_leave_on_signals(workdir))
            figures = train_and_evaluate(config, workdir)
        except FlagError as error:
            _exit(error, 2)
        except (DataError, FloatingPointError, CheckpointError) as error:
            _exit(error, 1)
        except OSError as error:
            _exit(f"{error}; see {workdir}", 1)
        except runs.PicturesError as error:
            print(runs.to_json(error.figures), flush=True)
            _exit(error, 1)
        except Interrupted as interrupt:
            _exit(f"{interrupt}; see {workdir}", 128 + interrupt.signum)
        print(runs.to_json(figures), flush=True)


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
            if {entry.name for entry in path.iterdir()} - {".lock", "model.json"}:
                raise FileExistsError(f"{path} is not empty, and not the folder of a run")
            if not os.access(path, os.W_OK):
                raise PermissionError(f"{path} cannot be written to")
    except (OSError, RuntimeError, ValueError) as error:
        raise FlagError(f"--workdir: {error}") from error
    return path


class _Outliving:
    """A stream that drops what it cannot write: a closed pipe or a full disk ends no run."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name):
        return getattr(self._stream, name)


def _outlive_streams() -> None:
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if isinstance(stream, _Outliving):
            continue
        if stream is None:
            # It was closed: what is opened next must not take its number.
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            stream = io.StringIO()
        # A text may hold what a terminal cannot show.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
        setattr(sys, name, _Outliving(stream))


@contextlib.contextmanager
def _leave_on_signals(workdir: pathlib.Path) -> Iterator[None]:
    """Makes signals end the process at once, where the training loop does not defer them.

    Python's own way, an exception from anywhere, may be swallowed by a callback of JAX, and may
    crash the interpreter as it unwinds. All files are either whole or lines, so this loses nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signum, frame):
        see = f"; see {workdir}" if workdir.exists() else ""
        with contextlib.suppress(OSError):
            os.write(2, f"\ninterrupted{see}\n".encode())
        os._exit(128 + signum)

    previous = {
        signum: signal.signal(signum, leave)
        for signum in SIGNALS
        if signum == signal.SIGINT or signal.getsignal(signum) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _exit(message: object, status: int) -> NoReturn:
    print(" ".join(str(message).split()), file=sys.stderr)
    sys.exit(status)
