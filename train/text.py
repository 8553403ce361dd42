"""Texts as bytes, split for a language model, and the models that count pairs of bytes."""

import hashlib
import os
import pathlib
import sysconfig
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from train.data import MOST_BYTES, DataError, expanded, open_tfds, read

NUM_BYTES = 256
# Of a zip file, and of what Zstandard packs.
_PACKED = (b"PK\x03\x04", b"\x28\xb5\x2f\xfd")
_TAR_MAGIC = slice(257, 262), b"ustar"
# No set of tensorflow-datasets is called like this.
_SUFFIXES = (".txt", ".md", ".gz", ".zip")


class Corpus(NamedTuple):
    """A text as bytes, uint8 [n]: the first 90% to fit, then 5% to choose on, and 5% to report.

    Attributes:
      train: the first part.
      validation: the second.
      test: the last.
      sha256: of the whole, in hexadecimal.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    sha256: str


def load(name: str, data_dir: str | None = None) -> Corpus:
    """Loads a text by name, always split in the same way.

    - `stdlib`: the sources of Python's standard library on this machine, without its tests. They
      differ by version: compare hashes.
    - a path to a file, plain or compressed by gzip, bzip2 or xz: its bytes. For enwik8 the split
      is the standard one, 90, 5 and 5 million.
    - a path to a folder: its files that are text (UTF-8).
    - another name: the `text` of the training part of that set of tensorflow-datasets.

    Several files follow each other in an order of their own, by a hash of their names, so that no
    part is all of one kind.

    Raises:
      DataError: the text is missing, unreadable, empty or longer than int32 counts.
    """
    path = expanded(name)
    if name == "stdlib":
        library = pathlib.Path(sysconfig.get_paths()["stdlib"])
        left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
        files = [
            file
            for file in library.rglob("*.py")
            if not left_out & set(file.relative_to(library).parts)
        ]
        text = _join(library, files)
    elif name and os.path.isdir(path):
        text = _join(path, [file for file in path.rglob("*") if file.is_file()])
    elif os.path.isfile(path):
        text = read(path, unpack=True)
        place, magic = _TAR_MAGIC
        if text.startswith(_PACKED) or text[place] == magic:
            raise DataError(f"--corpus={name}: is an archive, want what is in it")
    elif not name or name[0] in "/.~" or path.suffix in _SUFFIXES:
        raise DataError(f"--corpus={name}: there is no such file or folder")
    else:
        (examples,) = open_tfds(
            name,
            data_dir,
            features=["text"],
            splits=["train"],
            flag=f"--corpus={name} (no such file or folder)",
            otherwise=", or --corpus=PATH, any text",
        )
        text = b"\n".join(example["text"] for example in examples)
    if not 0 < len(text) <= MOST_BYTES:
        raise DataError(f"--corpus={name}: {len(text)} bytes of text, want 1 to {MOST_BYTES}")
    array = np.frombuffer(text, np.uint8)
    parts = np.split(array, [len(array) * 9 // 10, len(array) * 19 // 20])
    return Corpus(*parts, hashlib.sha256(text).hexdigest())


def windows(text: np.ndarray, length: int, count: int) -> np.ndarray:
    """The first `count` windows of `length` bytes and the one that follows: uint8 [n, length + 1].

    Windows share no byte that is to be predicted. There may be fewer of them, but at least one.

    Raises:
      DataError: the text is shorter than a window.
    """
    if len(text) <= length:
        raise DataError(
            f"--length={length} needs {length + 1} bytes in each part of the text, which has 90, 5 "
            f"and 5% of it: got {len(text)}"
        )
    starts = np.arange(0, len(text) - length, length)[:count, None]
    return text[starts + np.arange(length + 1)]


def count_bits(text: np.ndarray, held_out: np.ndarray) -> dict[str, float]:
    """Bits per byte of models that count, made from `text`, on windows [n, length + 1].

    The unigram knows how often a byte occurs (with 1 added to each count); the bigram, how often
    after the byte before it, blended with the unigram as if that had been seen once more there.

    Returns:
      `unigram` and `bigram`.
    """
    before, after = held_out[:, :-1], held_out[:, 1:]
    single = np.bincount(text, minlength=NUM_BYTES) + 1.0
    single /= single.sum()
    codes = text[:-1].astype(np.int32) * NUM_BYTES + text[1:]
    pairs = np.bincount(codes, minlength=NUM_BYTES**2).reshape(NUM_BYTES, NUM_BYTES)
    pairs = (pairs + single) / (pairs.sum(1, keepdims=True) + 1)
    return {
        "unigram": float(-np.log2(single[after]).mean()),
        "bigram": float(-np.log2(pairs[before, after]).mean()),
    }


def _join(folder: pathlib.Path, files: Iterable[pathlib.Path]) -> bytes:
    def key(file: pathlib.Path) -> bytes:
        return hashlib.sha256(os.fsencode(file.relative_to(folder))).digest()

    texts = [read(file, unpack=False) for file in sorted(files, key=key)]
    return b"\n".join(text for text in texts if _is_text(text))


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in content
