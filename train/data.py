"""Images and labels of the tasks that look at digits, as NumPy arrays in memory."""

import bz2
import contextlib
import dataclasses
import gzip
import importlib.util
import logging
import lzma
import math
import pathlib
import socket
import typing
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from sklearn import datasets

Name = Literal["digits", "mnist", "fashion_mnist", "kmnist", "svhn_cropped"]
# Those that are read from, or kept in, a folder that the user names.
WITH_FOLDER = tuple(name for name in typing.get_args(Name) if name != "digits")

MOST_BYTES = 2**31 - 1
_COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
_MAGIC_BYTES = max(map(len, _COMPRESSED))
# Asked before a download, which would otherwise try again for minutes.
_DOWNLOAD_HOST = ("storage.googleapis.com", 443)


class DataError(ValueError):
    """Data that cannot be used; the message is one line that says which file and why."""


class Split(NamedTuple):
    """A part of a data set.

    Attributes:
      images: float32 [n, h, w, c] in [0, 1].
      labels: int32 [n].
    """

    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Three disjoint splits: fit on `train`, choose on `validation`, report on `test`."""

    train: Split
    validation: Split
    test: Split


def load(name: Name, data_dir: str | None = None) -> Dataset:
    """Loads a data set by name, always split in the same way.

    - `digits`: the 1797 handwritten 8x8 digits that come with scikit-learn, shuffled once by a
      fixed seed into 1258 for training, 180 for validation and 359 for testing.
    - `mnist`, `fashion_mnist`, `kmnist`: with `data_dir`, the four IDX files in that folder, plain
      or gzipped; without, from tensorflow-datasets.
    - `svhn_cropped`: from tensorflow-datasets, which keeps its sets in `data_dir`.

    The last twelfth of the training part is for validation: 55000, 5000 and 10000 images of MNIST.
    tensorflow-datasets looks in its own folder where `data_dir` is None. Reading a set that is
    prepared needs the extra `tfds`; preparing one, once, also a network and TensorFlow.

    Raises:
      DataError: for an unknown name, for a missing, damaged or contradictory file, and where a set
        can be neither read nor prepared.
    """
    match name:
        case "digits":
            return _load_digits()
        case "mnist" | "fashion_mnist" | "kmnist" if data_dir is not None:
            folder = expanded(data_dir)
            return _hold_out(_read_pair(folder, "train"), _read_pair(folder, "t10k"), folder)
        case "mnist" | "fashion_mnist" | "kmnist" | "svhn_cropped":
            return _load_tfds(name, data_dir)
        case _:
            names = ", ".join(map(repr, typing.get_args(Name)))
            raise DataError(f"--dataset must be one of {names}, got {name!r}")


def expanded(path: str) -> pathlib.Path:
    """The path that a user wrote, without the `~`.

    Raises:
      DataError: there is no such user.
    """
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(f"{path}: {error}") from error


def _load_digits() -> Dataset:
    bunch = datasets.load_digits()
    images = (bunch.images[..., None] / 16).astype(np.float32)
    labels = bunch.target.astype(np.int32)
    # Unlike that of `default_rng`, the stream of `RandomState` is the same in every NumPy version.
    order = np.random.RandomState(0).permutation(len(labels))
    parts = np.split(order, [1258, 1258 + 180])
    return Dataset(*(Split(images[part], labels[part]) for part in parts))


def _hold_out(fit: Split, test: Split, source: object) -> Dataset:
    """Makes the last twelfth of what is for fitting the validation split."""
    if fit.images.shape[1:] != test.images.shape[1:]:
        shapes = " and ".join(str(split.images.shape[1:]) for split in (fit, test))
        raise DataError(f"{source}: training and test images of different shapes, {shapes}")
    first = len(fit.labels) - math.ceil(len(fit.labels) / 12)
    if first < 1:
        raise DataError(f"{source}: {len(fit.labels)} training image, wanted at least 2")
    train, validation = (Split(*(x[part] for x in fit)) for part in (np.s_[:first], np.s_[first:]))
    return Dataset(train, validation, test)


def open_tfds(
    name: str,
    data_dir: str | None,
    *,
    features: Iterable[str],
    splits: Iterable[str],
    flag: str,
    otherwise: str = "",
) -> list[Sequence[dict[str, Any]]]:
    """Examples of splits of a set of tensorflow-datasets, which is prepared first if need be.

    Args:
      name: of the set.
      data_dir: where sets are; their own folder where None.
      features: what examples must have.
      splits: names of parts of the set.
      flag: that asked for it, to begin an error with.
      otherwise: what else the user could do, to end an error with.

    Returns:
      For each split its examples.

    Raises:
      DataError: it is not installed, has no such set, feature or split, or cannot prepare the set;
        at once where that can be known, not after minutes of trying.
    """
    try:
        import tensorflow_datasets as tfds  # noqa: PLC0415, an extra of ours
    except ImportError as error:
        raise DataError(
            f"{flag} needs pip install 'hyperlayer_jax[tfds]' ({error}){otherwise}"
        ) from error
    # It warns of a set that is not prepared, which is what we are about to tell ourselves.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        data_dir = data_dir and str(expanded(data_dir))
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
        raise DataError(f"{flag}: {str(error).splitlines()[0]}{otherwise}") from error
    _require(f"{flag}: features", features, builder.info.features)
    if not builder.is_prepared():
        problem = _why_not_to_prepare()
        if problem:
            raise DataError(f"{flag} is not in {builder.data_dir}: {problem}{otherwise}")
        try:
            builder.download_and_prepare()
        except Exception as error:  # Whatever the code of one of a thousand sets may raise.
            raise DataError(f"{flag} could not be prepared: {error!r}{otherwise}") from error
    _require(f"{flag}: splits", splits, builder.info.splits)
    return [builder.as_data_source(split) for split in splits]


def _require(what: str, names: Iterable[str], there: Iterable[str]) -> None:
    missing = [name for name in names if name not in there]
    if missing:
        raise DataError(f"{what} {', '.join(missing)}: not among those there, {', '.join(there)}")


def _load_tfds(name: str, data_dir: str | None) -> Dataset:
    idx = "" if name == "svhn_cropped" else ", or --data_dir, a folder with its four IDX files"
    splits = open_tfds(
        name,
        data_dir,
        features=("image", "label"),
        splits=("train", "test"),
        flag=f"--dataset={name}",
        otherwise=idx,
    )
    fit, test = (
        Split(
            np.stack([example["image"] for example in split]).astype(np.float32) / 255,
            np.array([example["label"] for example in split], np.int32),
        )
        for split in splits
    )
    return _hold_out(fit, test, f"--dataset={name}")


def _why_not_to_prepare() -> str | None:
    if importlib.util.find_spec("tensorflow") is None:
        return "preparing it there needs pip install tensorflow, once"
    try:
        socket.create_connection(_DOWNLOAD_HOST, timeout=3).close()
    except OSError as error:
        return f"downloading it needs a network ({error}); else put a prepared copy there"
    return None


def _read_pair(folder: pathlib.Path, prefix: str) -> Split:
    image_path = _find(folder, f"{prefix}-images", 3)
    label_path = _find(folder, f"{prefix}-labels", 1)
    images = _read_idx(image_path, 3)
    labels = _read_idx(label_path, 1)
    if len(images) != len(labels):
        raise DataError(f"{image_path} has {len(images)} images, {label_path} {len(labels)} labels")
    if labels.max() > 9:
        raise DataError(f"{label_path}: a label of {labels.max()}, wanted 0 to 9")
    return Split(images[..., None].astype(np.float32) / 255, labels.astype(np.int32))


def _find(folder: pathlib.Path, stem: str, ndim: int) -> pathlib.Path:
    names = [f"{stem}{dot}idx{ndim}-ubyte{end}" for dot in "-." for end in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"{folder}: found none of {', '.join(names)}")


def read(path: pathlib.Path, *, unpack: bool) -> bytes:
    """The content of a file.

    Args:
      path: of the file.
      unpack: whether what is compressed by gzip, bzip2 or xz comes plain.

    Raises:
      DataError: it cannot be read, or unpacked, or is longer than int32 counts.
    """
    try:
        with path.open("rb") as file:
            start = file.read(_MAGIC_BYTES)
            file.seek(0)
            kinds = [opened for magic, opened in _COMPRESSED.items() if start.startswith(magic)]
            with kinds[0](file) if unpack and kinds else contextlib.nullcontext(file) as plain:
                content = plain.read(MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, MemoryError) as error:
        raise DataError(f"{path}: cannot be read: {str(error) or 'out of memory'}") from error
    if len(content) > MOST_BYTES:
        raise DataError(f"{path}: has more than {MOST_BYTES} bytes")
    return content


def _read_idx(path: pathlib.Path, ndim: int) -> np.ndarray:
    """Reads a file of unsigned bytes: two zeros, 8, the rank, big-endian sizes, then the bytes."""
    content = read(path, unpack=True)
    magic = bytes([0, 0, 8, ndim])
    if content[:4] != magic:
        raise DataError(f"{path}: starts with 0x{content[:4].hex()}, wanted 0x{magic.hex()}")
    start = 4 + 4 * ndim
    if len(content) < start:
        raise DataError(f"{path}: {len(content)} bytes, wanted a header of {start}")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", ndim, offset=4))
    if 0 in shape:
        raise DataError(f"{path}: is empty, of shape {shape}")
    if len(content) != start + math.prod(shape):
        raise DataError(
            f"{path}: {len(content)} bytes, wanted {start + math.prod(shape)} for shape {shape}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
