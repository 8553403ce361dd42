"""Checkpoints of a run: written whole or not at all, checked when they are read."""

import contextlib
import functools
import hashlib
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

_TEMPORARY = "*.orbax-checkpoint-tmp*"


class CheckpointError(Exception):
    """No checkpoint can be used, or none written; the message is one line."""


class Restored(NamedTuple):
    """What a checkpoint held.

    Attributes:
      step: it was saved at.
      tree: of arrays, of the structure and on the devices of the template.
      info: what else was to be remembered; can be written as JSON.
    """

    step: int
    tree: Any
    info: dict[str, Any]


class Checkpoints:
    """The checkpoints in a folder, by step: the last few, and the best.

    They are written by Orbax in the background, each with the SHA-256 of its arrays beside them.
    """

    def __init__(self, folder: pathlib.Path, *, keep: int = 1, read_only: bool = False):
        self.folder = folder.absolute()
        self.best = None
        self._keep, self._read_only = keep, read_only
        if not read_only:
            remove_temporary(self.folder)
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self.folder,
            item_handlers=ocp.StandardCheckpointHandler(),
            # Lightweight: what is damaged is found when it is read, not here.
            options=ocp.CheckpointManagerOptions(
                create=not self._read_only, preservation_policy=self, lightweight_initialize=True
            ),
        )

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Answers Orbax which checkpoints, the oldest first, are to stay."""
        del context
        last = len(checkpoints) - self._keep
        return [i >= last or x.step == self.best for i, x in enumerate(checkpoints)]

    def steps(self) -> list[int]:
        """The steps there are checkpoints of, the newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def save(self, step: int, tree: Any, info: dict[str, Any]) -> None:
        """Begins to save a tree of arrays that nobody changes; does nothing if `step` is saved.

        Raises:
          CheckpointError: this one or the one before could not be written.
        """
        if step in self._manager.all_steps():
            return
        arrays = _named(tree)
        try:
            self._manager.save(
                step,
                args=ocp.args.StandardSave(arrays),
                custom_metadata=info | {"sha256": _digest(arrays, info)},
                force=True,
            )
        except Exception as error:  # Orbax and TensorStore raise what they like.
            raise CheckpointError(f"{self.folder / str(step)}: {_one_line(error)}") from error

    def wait(self) -> None:
        """Waits until what was saved is on the disk.

        Raises:
          CheckpointError: it could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise CheckpointError(f"{self.folder}: {_one_line(error)}") from error

    def restore(self, template: Any = None, *, step: int | None = None) -> Restored | None:
        """Reads the newest checkpoint that is not damaged, or None where there is none at all.

        Those that are damaged are named on standard error, and, unless this is read only, moved to
        a folder `damaged` as soon as one is found that is not.

        Args:
          template: a tree of arrays, those without PRNG keys also as their shape, dtype and
            sharding; None for a dictionary of all arrays by name.
          step: to read that checkpoint and no other.

        Raises:
          CheckpointError: all are damaged; they are left where they are.
        """
        wanted = self.steps() if step is None else [step]
        damaged = []
        for number in wanted:
            try:
                with _quiet():
                    tree, info = self._read(number, template)
            except Exception as error:  # Orbax and TensorStore raise what they like.
                damaged.append(number)
                message = f"the checkpoint {self.folder / str(number)} is damaged"
                print(f"{message}: {_one_line(error)}", file=sys.stderr, flush=True)
                continue
            if damaged:
                print(f"going on from the one of step {number}", file=sys.stderr, flush=True)
                if not self._read_only:
                    self._set_aside(damaged)
            return Restored(number, tree, info)
        if damaged:
            names = ", ".join(map(str, damaged))
            raise CheckpointError(
                f"{self.folder}: no checkpoint is usable, tried those of steps {names}; "
                "nothing was deleted"
            )
        return None

    def close(self) -> None:
        """Ends the work in the background."""
        self._manager.close()

    def _read(self, step: int, template: Any) -> tuple[Any, dict[str, Any]]:
        info = self._manager.metadata(step).custom_metadata
        if template is None:
            here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            metadata = self._manager.item_metadata(step)
            template = {
                name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
                for name, x in metadata.items()
            }
        arrays, info = _checked(
            lambda abstract: self._manager.restore(step, args=ocp.args.StandardRestore(abstract)),
            info,
            _named(template),
        )
        return rebuild(template, arrays), info

    def _set_aside(self, steps: list[int]) -> None:
        if jax.process_index() == 0:
            aside = self.folder.parent / "damaged"
            aside.mkdir(exist_ok=True)
            for step in steps:
                shutil.rmtree(aside / str(step), ignore_errors=True)
                (self.folder / str(step)).rename(aside / str(step))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self._manager.close()
        self._manager = self._open()


def save_tree(path: pathlib.Path, tree: Any) -> None:
    """Saves a tree of arrays by itself, in place of what was there.

    Raises:
      CheckpointError: it could not be written.
    """
    arrays = _named(tree)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(
                path.absolute(),
                arrays,
                force=True,
                custom_metadata={"sha256": _digest(arrays, {})},
            )
    except Exception as error:
        raise CheckpointError(f"{path}: {_one_line(error)}") from error


def load_tree(path: pathlib.Path, template: Any) -> Any:
    """Reads what `save_tree` wrote, onto the devices of the template.

    Raises:
      CheckpointError: it is damaged, or of another structure.
    """
    try:
        with _quiet(), ocp.StandardCheckpointer() as checkpointer:
            info = checkpointer.metadata(path.absolute()).custom_metadata
            read = functools.partial(checkpointer.restore, path.absolute())
            return rebuild(template, _checked(read, info, _named(template))[0])
    except Exception as error:
        raise CheckpointError(f"{path} is damaged: {_one_line(error)}") from error


def remove_temporary(folder: pathlib.Path) -> None:
    """Removes what saves that were killed have left in a folder."""
    for path in folder.glob(_TEMPORARY):
        shutil.rmtree(path, ignore_errors=True)


def names_of(tree: Any) -> list[str]:
    """A name for each leaf of a tree: the way to it."""
    paths = (path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0])
    names = (jax.tree_util.keystr(path, simple=True, separator="/") for path in paths)
    return [name.removesuffix("/value") for name in names]


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by name, PRNG keys as the integers that they are."""
    return dict(zip(names_of(tree), map(_plain, jax.tree.leaves(tree)), strict=True))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within, Orbax logs nothing, and errors in threads that it leaves behind are not printed."""
    verbosity, hook = logging.get_verbosity(), sys.unraisablehook
    logging.set_verbosity(logging.FATAL)
    sys.unraisablehook = lambda _: None
    try:
        yield
    except Exception:
        # Reads of other arrays go on for a moment, and then find nobody to tell.
        time.sleep(0.2)
        raise
    finally:
        logging.set_verbosity(verbosity)
        sys.unraisablehook = hook


def is_key(leaf: Any) -> bool:
    """Whether an array holds PRNG keys."""
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf):
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def _checked(read, info, abstract):
    """Reads arrays by name, and what is remembered with them; both as their digest has them."""
    expected = (info := dict(info or {})).pop("sha256", None)
    if expected is None:
        raise ValueError("its SHA-256 is missing")
    arrays = read(jax.tree.map(ocp.utils.to_shape_dtype_struct, abstract))
    if _digest(arrays, info) != expected:
        raise ValueError("its arrays are not those of its SHA-256")
    return arrays, info


def rebuild(template: Any, arrays: dict[str, jax.Array]) -> Any:
    """A tree of the structure of `template`, of named arrays."""
    leaves, treedef = jax.tree.flatten(template)
    named = zip(names_of(template), leaves, strict=True)
    return treedef.unflatten([_as_before(arrays[name], leaf) for name, leaf in named])


def _as_before(array, leaf):
    if not is_key(leaf):
        return array
    return jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf))


def _digest(arrays: dict[str, jax.Array], info: dict[str, Any]) -> str:
    """SHA-256 of named arrays and what is remembered with them."""
    digest = hashlib.sha256(json.dumps(info, sort_keys=True).encode())
    for name in sorted(arrays):
        array = to_host(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def to_host(array: jax.Array) -> np.ndarray:
    """All of an array in the memory of this process, wherever its parts are."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        if array.is_fully_replicated:
            return np.asarray(array.addressable_data(0))
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
