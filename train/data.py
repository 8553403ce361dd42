"""Images and labels of the tasks that look at digits, as NumPy arrays in memory."""

import dataclasses
import gzip
import math
import pathlib
import zlib
from typing import Literal, NamedTuple

import numpy as np
from sklearn import datasets

Name = Literal["digits", "mnist"]

_GZIP_MAGIC = b"\x1f\x8b"


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
    - `mnist`: the four IDX files in the folder `data_dir`, plain or gzipped. The last twelfth of
      the training file is for validation: 55000, 5000 and 10000 images of MNIST itself.

    Raises:
      DataError: for an unknown name, and for a missing, damaged or contradictory file.
    """
    match name:
        case "digits":
            return _load_digits()
        case "mnist":
            if data_dir is None:
                raise DataError("--dataset=mnist needs --data_dir, the folder of its IDX files")
            return _load_idx(pathlib.Path(data_dir))
        case _:
            raise DataError(f"--dataset must be 'digits' or 'mnist', got {name!r}")


def _load_digits() -> Dataset:
    bunch = datasets.load_digits()
    images = (bunch.images[..., None] / 16).astype(np.float32)
    labels = bunch.target.astype(np.int32)
    # Unlike that of `default_rng`, the stream of `RandomState` is the same in every NumPy version.
    order = np.random.RandomState(0).permutation(len(labels))
    parts = np.split(order, [1258, 1258 + 180])
    return Dataset(*(Split(images[part], labels[part]) for part in parts))


def _load_idx(folder: pathlib.Path) -> Dataset:
    images, labels = _read_pair(folder, "train")
    first = len(labels) - math.ceil(len(labels) / 12)
    if first < 1:
        raise DataError(f"{folder}: {len(labels)} training image, wanted at least 2")
    return Dataset(
        Split(images[:first], labels[:first]),
        Split(images[first:], labels[first:]),
        _read_pair(folder, "t10k"),
    )


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


def _read_idx(path: pathlib.Path, ndim: int) -> np.ndarray:
    """Reads a file of unsigned bytes: two zeros, 8, the rank, big-endian sizes, then the bytes."""
    try:
        content = path.read_bytes()
        if content.startswith(_GZIP_MAGIC):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
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
