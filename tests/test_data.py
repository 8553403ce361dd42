import gzip
import importlib.util
import re
import socket
import struct
import sys
import types

import numpy as np
import pytest

load_digits = pytest.importorskip("sklearn.datasets").load_digits

from train import data  # noqa: E402

COUNTS = {"train": 24, "t10k": 5}


def idx(array):
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


@pytest.fixture
def folder(tmp_path):
    """The four files, with images of 3x2 whose pixels count up and labels that go round."""
    for prefix, count in COUNTS.items():
        images = np.arange(count * 6, dtype=np.uint8).reshape(count, 3, 2)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (tmp_path / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path


def test_digits_are_split_once_and_for_all():
    digits = data.load("digits")
    splits = (digits.train, digits.validation, digits.test)
    assert [len(split.labels) for split in splits] == [1258, 180, 359]
    for split in splits:
        assert split.images.dtype == np.float32 and split.images.shape[1:] == (8, 8, 1)
        assert split.images.min() == 0 and split.images.max() == 1
        assert split.labels.dtype == np.int32 and set(split.labels) == set(range(10))
    assert digits.test.labels[:8].tolist() == [9, 4, 7, 0, 2, 6, 1, 3]
    together = sorted(image.tobytes() for split in splits for image in split.images)
    whole = (load_digits().images / 16).astype(np.float32)
    assert together == sorted(image.tobytes() for image in whole)


def test_idx_files(folder):
    mnist = data.load("mnist", str(folder))
    assert [len(s.labels) for s in (mnist.train, mnist.validation, mnist.test)] == [22, 2, 5]
    assert mnist.train.images.shape == (22, 3, 2, 1) and mnist.train.images.dtype == np.float32
    assert mnist.train.labels.dtype == np.int32
    np.testing.assert_allclose(mnist.validation.images[-1].ravel() * 255, np.arange(138, 144))
    assert mnist.validation.labels.tolist() == [2, 3]


def test_idx_files_gzipped_and_with_a_dot(folder):
    plain = data.load("mnist", str(folder))
    for path in list(folder.iterdir()):
        zipped = path.with_name(path.name.replace("-idx", ".idx") + ".gz")
        zipped.write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    np.testing.assert_array_equal(data.load("mnist", str(folder)).test.images, plain.test.images)


ZIPPED = gzip.compress(idx(np.arange(24, dtype=np.uint8)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-labels-idx1-ubyte", b"", "starts with 0x, wanted 0x00000801"),
        ("train-labels-idx1-ubyte", b"<html>", "starts with 0x3c68746d, wanted 0x00000801"),
        ("train-images-idx3-ubyte", idx(np.zeros(24, np.uint8)), "0x00000801, wanted 0x00000803"),
        ("t10k-images-idx3-ubyte", b"\0\0\x08\x03\0\0", "6 bytes, wanted a header of 16"),
        ("t10k-images-idx3-ubyte", idx(np.zeros((0, 3, 2), np.uint8)), "is empty"),
        (
            "t10k-images-idx3-ubyte",
            idx(np.zeros((5, 3, 2), np.uint8))[:-1],
            "45 bytes, wanted 46 for shape (5, 3, 2)",
        ),
        ("train-labels-idx1-ubyte", idx(np.zeros(24, np.uint8)) + b"?", "33 bytes, wanted 32"),
        ("train-labels-idx1-ubyte", idx(np.full(24, 11, np.uint8)), "a label of 11"),
        ("train-labels-idx1-ubyte", idx(np.zeros(23, np.uint8)), "23 labels"),
        (
            "t10k-images-idx3-ubyte",
            idx(np.zeros((5, 2, 3), np.uint8)),
            "different shapes, (3, 2, 1) and (2, 3, 1)",
        ),
        ("train-labels-idx1-ubyte", ZIPPED[:-9], "cannot be read"),
        ("train-labels-idx1-ubyte", ZIPPED[:14] + b"??" + ZIPPED[16:], "cannot be read"),
        ("train-labels-idx1-ubyte", ZIPPED[:-8] + b"????" + ZIPPED[-4:], "cannot be read"),
    ],
    # Bytes of gzip hold the time: no two processes would find the same tests.
    ids=lambda value: f"{len(value)} bytes" if isinstance(value, bytes) else None,
)
def test_damaged_file_is_named(name, content, message, folder):
    (folder / name).write_bytes(content)
    with pytest.raises(data.DataError, match=re.escape(message)) as error:
        data.load("mnist", str(folder))
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    assert name in str(error.value) or "different shapes" in message


def test_missing_file_lists_the_names_looked_for(folder):
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(data.DataError, match=r"t10k-labels-idx1-ubyte, .*\.idx1-ubyte\.gz"):
        data.load("mnist", str(folder))
    with pytest.raises(data.DataError, match="nowhere"):
        data.load("mnist", str(folder / "nowhere"))


def test_wrong_request_names_the_flag():
    with pytest.raises(data.DataError, match=r"--dataset .* 'kmnist', .* got 'cifar'"):
        data.load("cifar")


@pytest.mark.parametrize("name", ["fashion_mnist", "kmnist"])
def test_idx_folders_of_other_sets(name, folder):
    images = data.load("mnist", str(folder)).train.images
    np.testing.assert_array_equal(data.load(name, str(folder)).train.images, images)


class Builder:
    """Stands for a builder of tensorflow-datasets, whose set may be prepared."""

    def __init__(self, prepared, folder):
        self.prepared, self.data_dir = prepared, folder
        self.info = types.SimpleNamespace(features=["image", "label"], splits=["train", "test"])

    def is_prepared(self):
        return self.prepared

    def download_and_prepare(self):
        self.prepared = True

    def as_data_source(self, split):
        count = {"train": 25, "test": 7}[split]
        return [
            {"image": np.full((4, 3, 3), i, np.uint8), "label": np.int64(i % 10)}
            for i in range(count)
        ]


def pretend(monkeypatch, folder, prepared, tensorflow=True):
    """Puts a module in place of tensorflow-datasets, and TensorFlow beside it or not."""
    module = types.SimpleNamespace(
        builder=lambda name, *, data_dir, file_format: Builder(prepared, data_dir or folder)
    )
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: module if tensorflow else None)


@pytest.mark.parametrize("prepared", [True, False])
def test_tensorflow_datasets(prepared, monkeypatch, tmp_path):
    pretend(monkeypatch, tmp_path, prepared)
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: socket.socket())
    svhn = data.load("svhn_cropped", str(tmp_path))
    assert [len(s.labels) for s in (svhn.train, svhn.validation, svhn.test)] == [22, 3, 7]
    assert svhn.train.images.shape == (22, 4, 3, 3) and svhn.train.images.dtype == np.float32
    assert svhn.validation.labels.tolist() == [2, 3, 4] and svhn.test.labels.dtype == np.int32
    np.testing.assert_allclose(svhn.test.images[:, 0, 0, 0] * 255, np.arange(7), rtol=1e-6)


def test_unprepared_set_says_at_once_what_is_missing(monkeypatch, tmp_path):
    pretend(monkeypatch, tmp_path, prepared=False, tensorflow=False)
    with pytest.raises(data.DataError, match="needs pip install tensorflow, once, or --data_dir"):
        data.load("mnist")

    def refuse(*_, timeout):
        assert timeout <= 3
        raise OSError("no route")

    pretend(monkeypatch, tmp_path, prepared=False)
    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(data.DataError, match=r"needs a network \(no route\)") as error:
        data.load("svhn_cropped")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(data.DataError, match=r"pip install 'hyperlayer_jax\[tfds\]'.*--data_dir"):
        data.load("kmnist")
