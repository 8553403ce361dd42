"""The folder of a run: who owns it, what is in it, and how a model comes back from it.

config.json         the flags
model.json          the task, and what else its model was made from
metrics.jsonl       figures by step; TensorBoard events hold the same
evaluations/        results of each evaluation, arrays included
checkpoints/        all that it takes to continue
params/             the trained model
results.json        figures on test data, and where they come from
"""

import contextlib
import dataclasses
import fcntl
import importlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from train import checkpoints
from train.config import Config, FlagError, make

Scalars = dict[str, Any]

# Folders that this process owns, with the thread that does and the open lock.
_owned: dict[pathlib.Path, tuple[int, Any]] = {}
_sessions: dict[int, contextlib.ExitStack] = {}
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@contextlib.contextmanager
def owned(workdir: pathlib.Path) -> Iterator[None]:
    """Makes a folder and locks it; the lock dies with its process.

    What a thread owns it may ask for again.

    Raises:
      FlagError: it is owned by another process or thread, or cannot be made or locked.
    """
    if jax.process_index() > 0:
        yield
        return
    path = workdir.absolute()
    thread, _ = _owned.get(path, (None, None))
    if thread == threading.get_ident():
        yield
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / ".lock", "w")  # noqa: SIM115, held until it is released
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FlagError(f"--workdir: {workdir} is in use by another run") from None
    except OSError as error:
        raise FlagError(f"--workdir: {error}") from error
    _owned[path] = (threading.get_ident(), lock)

    def release():
        del _owned[path]
        lock.close()

    with contextlib.ExitStack() as until:
        _sessions.get(threading.get_ident(), until).callback(release)
        yield


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Surrounds all of a launched run: folders that it owns stay its own to the end."""
    with contextlib.ExitStack() as until:
        _sessions[threading.get_ident()] = until
        try:
            yield
        finally:
            del _sessions[threading.get_ident()]


def launched() -> bool:
    """Whether this thread is that of a launched run, not of someone who uses us as a library."""
    return threading.get_ident() in _sessions


def is_run(workdir: pathlib.Path) -> bool:
    """Whether a run began in a folder."""
    return (workdir / "config.json").is_file() and (workdir / "model.json").is_file()


def read_config(workdir: pathlib.Path, config_class: type[Config]) -> dict[str, Any]:
    """The flags of the run in a folder, by name.

    Raises:
      FlagError: they cannot be read.
    """
    try:
        values = json.loads((workdir / "config.json").read_text())
        unknown = values.keys() - {field.name for field in dataclasses.fields(config_class)}
        if unknown:
            raise ValueError(f"has flags that are not of this task: {', '.join(sorted(unknown))}")
    except (OSError, ValueError, AttributeError) as error:
        raise FlagError(f"{workdir / 'config.json'}: {error}") from error
    return values


def differences(config: Config, values: dict[str, Any]) -> list[str]:
    """What stands against continuing a run of flags `values` with a config; steps may grow."""
    problems = []
    for field in dataclasses.fields(config):
        if field.name not in values or not field.metadata["fixed"]:
            continue
        new, old = getattr(config, field.name), values[field.name]
        grown = field.name == "steps" and new > old
        if new != old and not grown:
            problems.append(f"--{field.name}={new} (the run: {old})")
    return problems


def begin(workdir: pathlib.Path, config: Config, inputs: tuple) -> None:
    """Writes what a run is, or checks that it is the one that is there.

    Raises:
      FlagError: another run is there.
    """
    if jax.process_count() > 1:
        # The others wait until the folder is checked and ready, or the first has given up.
        try:
            if jax.process_index() == 0:
                _begin(workdir, config, inputs)
        finally:
            multihost_utils.sync_global_devices("the run begins")
        return
    _begin(workdir, config, inputs)


def _begin(workdir: pathlib.Path, config: Config, inputs: tuple) -> None:
    spec = sys.modules["__main__"].__spec__
    module = type(config).__module__
    task = spec.name if module == "__main__" and spec else module
    described = {"task": task, "inputs": list(inputs)}
    if is_run(workdir):
        found = read_json(workdir / "model.json")
        problems = differences(config, read_config(workdir, type(config)))
        if found != described:
            problems.append(f"a model of {described} (the run: {found})")
        if problems:
            raise FlagError(f"--workdir: {workdir} has another run: {', '.join(problems)}")
    if config.mode == "eval":
        return
    checkpoints.remove_temporary(workdir)
    write_json(workdir / "model.json", described)
    write_json(workdir / "config.json", dataclasses.asdict(config))


def read_json(path: pathlib.Path) -> Any:
    """Reads a file.

    Raises:
      FlagError: it cannot be read.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FlagError(f"{path}: {error}") from error


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a file of strict JSON, which never holds half of it."""
    hidden = path.with_name(f".{path.name}")
    hidden.write_text(to_json(value, indent=2) + "\n")
    os.replace(hidden, path)


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Strict JSON: scalars of arrays are numbers, and what is not finite is null."""
    return json.dumps(_strict(value), allow_nan=False, indent=indent)


def _strict(value):
    if isinstance(value, dict):
        return {key: _strict(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(entry) for entry in value]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def metric_writer(workdir: pathlib.Path, step: int) -> Iterator[Callable[[int, Scalars], None]]:
    """Yields what writes figures of a step, to follow those up to `step` that are there."""
    if jax.process_index() > 0:
        yield lambda step, scalars: None
        return
    path = workdir / "metrics.jsonl"
    kept = "".join(_lines_until(path, step))
    hidden = path.with_name(f".{path.name}")
    hidden.write_text(kept)
    os.replace(hidden, path)
    events = EventsWriter(str(workdir / "events"), filename_suffix=f".{os.getpid()}")
    if kept:
        # TensorBoard forgets what an earlier process wrote of later steps.
        start = SessionLog(status=SessionLog.START)
        events.write_event(Event(wall_time=time.time(), step=step + 1, session_log=start))
    with open(path, "a", buffering=1) as lines, contextlib.closing(events):

        def write(step: int, scalars: Scalars) -> None:
            lines.write(to_json({"step": step, **scalars}) + "\n")
            values = [Summary.Value(tag=tag, simple_value=x) for tag, x in scalars.items()]
            summary = Summary(value=values)
            events.write_event(Event(wall_time=time.time(), step=step, summary=summary))
            events.flush()

        yield write


def _lines_until(path: pathlib.Path, step: int) -> Iterator[str]:
    """Lines of metrics up to a step; a broken one is the last."""
    text = path.read_text(errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            row = json.loads(line)
            if row["step"] > step:
                return
        except (ValueError, KeyError, TypeError):
            return
        yield line + "\n"


def save_evaluation(workdir: pathlib.Path, step: int, results: dict[str, Any]) -> None:
    """Keeps scalars and arrays of the evaluation at a step."""
    if jax.process_index() > 0:
        return
    path = workdir / "evaluations" / f"{step}.npz"
    path.parent.mkdir(exist_ok=True)
    hidden = path.with_name(f".{path.name}")
    with open(hidden, "wb") as file:
        np.savez(file, **results)
    os.replace(hidden, path)


def load_evaluations(workdir: pathlib.Path, step: int) -> dict[int, dict[str, np.ndarray]]:
    """What was kept, in the order of steps, up to `step`; what is damaged is named only."""
    history = {}
    for path in (workdir / "evaluations").glob("[0-9]*.npz"):
        if int(path.stem) <= step:
            try:
                with np.load(path) as results:
                    history[int(path.stem)] = dict(results)
            except Exception as error:  # NumPy and zipfile raise what they like.
                print(f"{path} is damaged: {error}", file=sys.stderr)
    return dict(sorted(history.items()))


class PicturesError(Exception):
    """Pictures could not be written; the figures and the model are there.

    Attributes:
      figures: of the run.
    """

    def __init__(self, message: str, figures: Scalars):
        super().__init__(message)
        self.figures = figures


def report(
    workdir: pathlib.Path, figures: Scalars, draw: Callable[[], object] = lambda: None
) -> Scalars:
    """Ends a run: writes `results.json`, then pictures. Returns the figures.

    Args:
      workdir: of the run.
      figures: of the run, on test data.
      draw: writes pictures to the folder.

    Raises:
      FloatingPointError: a figure is not finite.
      OSError: `results.json` could not be written.
      PicturesError: the pictures could not.
    """
    for name, figure in figures.items():
        if isinstance(figure, float) and not math.isfinite(figure):
            raise FloatingPointError(f"{name} is {figure} on test data; the model is in {workdir}")
    if jax.process_index() > 0:
        return figures
    write_json(workdir / "results.json", {"figures": figures, **provenance()})
    try:
        draw()
    except (OSError, MemoryError) as error:
        message = f"pictures: {error}; the model and its figures are in {workdir}"
        raise PicturesError(message, figures) from error
    return figures


def provenance() -> dict[str, Any]:
    """What figures depend on beside flags: versions, machine, command and revision."""
    root = pathlib.Path(__file__).parent.parent
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        revision = None
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return {
        "command": shlex.join([pathlib.Path(sys.executable).name, *sys.orig_argv[1:]]),
        "git": revision,
        "devices": [device.device_kind for device in jax.devices()],
        "cores": len(affinity(0)),
        "processes": jax.process_count(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES}
        | {"python": platform.python_version()},
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def load_run(workdir: str | os.PathLike, *, best: bool = False) -> tuple[nnx.Module, Config]:
    """The model of a run, on this machine's first device, and the config of the run.

    Args:
      workdir: folder of the run, finished or not.
      best: the model that was best on validation data, instead of the last one.

    Raises:
      ValueError: there is no run, or none with a validation.
      checkpoints.CheckpointError: what it saved is damaged.
    """
    workdir = pathlib.Path(workdir).expanduser()
    if not is_run(workdir):
        raise ValueError(f"{workdir} is not the folder of a run: no config.json, model.json there")
    described = read_json(workdir / "model.json")
    task = importlib.import_module(described["task"])
    config = make(task.Config, read_config(workdir, task.Config))
    model = task.make_model(config, *described["inputs"])
    state = nnx.state(model, nnx.Not(nnx.RngState))
    if not best and (workdir / "params").is_dir():
        nnx.update(model, checkpoints.load_tree(workdir / "params", state))
        return model, config
    saved = checkpoints.Checkpoints(workdir / "checkpoints", read_only=True)
    try:
        restored = saved.restore()
        if best and restored is not None:
            if restored.info.get("best") is None:
                raise ValueError(f"{workdir}: no best model is kept by this run")
            restored = saved.restore(step=restored.info["best"]["step"])
    finally:
        saved.close()
    if restored is None:
        raise ValueError(f"{workdir}: the run has not saved anything yet")
    arrays = restored.tree
    prefix = "average/" if any(name.startswith("average/") for name in arrays) else "params/"
    found = {
        name.removeprefix(kind): array
        for kind in ("rest/", prefix)
        for name, array in arrays.items()
        if name.startswith(kind)
    }
    nnx.update(model, checkpoints.rebuild(state, found))
    return model, config
