"""Texts: how they are found and split, and the models that count."""

import bz2
import gzip
import lzma
import os
import sys
import tarfile
import types
import zipfile

import numpy as np
import pytest

pytest.importorskip("sklearn")

from train import data, text


def test_a_file_is_split_in_order(tmp_path):
    content = bytes(range(200)) * 5
    (tmp_path / "a.txt").write_bytes(content)
    corpus = text.load(str(tmp_path / "a.txt"))
    assert [len(part) for part in corpus[:3]] == [900, 50, 50]
    assert b"".join(part.tobytes() for part in corpus[:3]) == content


def test_a_folder_is_its_text_files_in_an_order_of_their_own(tmp_path):
    names = [f"{i}.txt" for i in range(8)]
    (tmp_path / "inner").mkdir()
    for i, name in enumerate(names):
        (tmp_path / ("inner" if i % 2 else ".") / name).write_text(f"<{name}>")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\x00")
    (tmp_path / "half.gz").write_bytes(gzip.compress(b"a log")[:-4])
    first, again = text.load(str(tmp_path)), text.load(str(tmp_path))
    whole = b"".join(part.tobytes() for part in first[:3]).decode()
    assert sorted(whole.split("\n")) == [f"<{name}>" for name in names]
    assert whole.split("\n") != [f"<{name}>" for name in names]
    assert first.sha256 == again.sha256 and len(first.sha256) == 64


def test_the_standard_library_is_there():
    corpus = text.load("stdlib")
    assert len(corpus.train) > 5_000_000
    assert b"import" in corpus.test.tobytes()


def test_a_gzipped_file_is_unpacked(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"to be or not to be" * 10))
    assert text.load(str(tmp_path / "a.gz")).train.tobytes().startswith(b"to be or not")


def test_a_zip_file_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "enwik8.zip", "w") as archive:
        archive.writestr("enwik8", "to be or not to be")
    with pytest.raises(data.DataError, match="is an archive"):
        text.load(str(tmp_path / "enwik8.zip"))


@pytest.mark.parametrize("name", ["nowhere.txt", "/no/such/folder", "a/b.gz", "", "../nowhere"])
def test_a_missing_text_is_named(name):
    with pytest.raises(data.DataError, match=f"--corpus={name}: there is no such file or folder"):
        text.load(name)


def pretend(monkeypatch, prepared, **options):
    """Puts a module in place of tensorflow-datasets; returns the `info` of its only set."""
    info = types.SimpleNamespace(features=["id", "text"], splits=["train"])
    builder = types.SimpleNamespace(
        info=info, data_dir="somewhere", is_prepared=lambda: prepared, **options
    )
    module = types.SimpleNamespace(builder=lambda *_, **__: builder)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)
    return info


def test_a_name_may_be_of_tensorflow_datasets(monkeypatch):
    texts = [f"{i} or not {i}\n".encode() for i in range(100)]
    examples = [{"text": text} for text in texts]
    info = pretend(monkeypatch, True, as_data_source=lambda split: examples)
    corpus = text.load("lm/small:1.0.0")
    assert b"".join(part.tobytes() for part in corpus[:3]) == b"\n".join(texts)
    info.splits = ["test"]
    with pytest.raises(data.DataError, match=r"--corpus=lm .*splits train: .* there, test"):
        text.load("lm")
    info.features = ["image", "label"]
    with pytest.raises(data.DataError, match=r"--corpus=lm .*features text: .* image, label"):
        text.load("lm")


def test_a_set_that_cannot_be_prepared_is_an_error(monkeypatch):
    def refuse():
        raise AssertionError("download it yourself")

    pretend(monkeypatch, False, download_and_prepare=refuse)
    monkeypatch.setattr(data, "_why_not_to_prepare", lambda: None)
    with pytest.raises(data.DataError, match=r"--corpus=lm .* prepared: .*download it yourself"):
        text.load("lm")


def test_an_empty_text_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(data.DataError, match="0 bytes of text"):
        text.load(str(tmp_path / "a.txt"))


def test_windows_share_no_target():
    windows = text.windows(np.arange(100, dtype=np.uint8), 10, 1000)
    assert windows.shape == (9, 11)
    assert len(np.unique(windows[:, 1:])) == 90
    with pytest.raises(data.DataError, match="--length=100"):
        text.windows(np.arange(100, dtype=np.uint8), 100, 1)


def test_counting_finds_what_there_is_to_count():
    fit = np.frombuffer(b"ab" * 5000, np.uint8)
    held_out = text.windows(fit, 20, 5)
    bits = text.count_bits(fit, held_out)
    assert abs(bits["unigram"] - 1) < 0.1
    assert bits["bigram"] < 0.01
    noise = np.random.default_rng(0).integers(0, 4, 100_000).astype(np.uint8)
    bits = text.count_bits(noise, text.windows(noise, 20, 500))
    assert abs(bits["unigram"] - 2) < 0.02 and abs(bits["bigram"] - 2) < 0.02


@pytest.mark.parametrize("module", [gzip, bz2, lzma], ids=lambda module: module.__name__)
def test_a_compressed_text_is_unpacked(module, tmp_path):
    path = tmp_path / "a text"
    with module.open(path, "wb") as file:
        file.write(b"to be " * 50)
    assert b"".join(part.tobytes() for part in text.load(str(path))[:3]) == b"to be " * 50
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(data.DataError, match="cannot be read"):
        text.load(str(path))


def test_archives_are_refused_and_home_is_found(monkeypatch, tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(__file__, "b.py")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(data.DataError, match="is an archive"):
        text.load("~/a.tar.gz")
    with pytest.raises(data.DataError, match="nobody-has-this-name"):
        text.load("~nobody-has-this-name/text")


def test_names_of_files_may_be_any_bytes(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    with open(path, "wb") as file:
        file.write(b"to be " * 50)
    for name in (path, os.fsencode(tmp_path)):
        assert text.load(os.fsdecode(name)).train.size == 270
