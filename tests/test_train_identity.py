"""The identity launcher: a few steps, its files, and that it does learn."""

import pytest

pytest.importorskip("tensorboardX", reason="launchers need the extra train")

from train import identity
from train.runs import load_run


def test_trains_evaluates_and_leaves_its_files(tmp_path):
    config = identity.Config(size=5, steps=3, mesh="data:1")
    result = identity.train_and_evaluate(config, tmp_path)
    assert {"mse", "loss", "compile_seconds", "train_seconds"} <= set(result)
    assert result["steps"] == 3 and result["test_examples"] == 1000
    assert (tmp_path / "tuples.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "tuples.gif").read_bytes().startswith(b"GIF")
    assert load_run(tmp_path)[1] == config


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 8])
def test_learns_the_identity_exactly(tmp_path, size, monkeypatch):
    monkeypatch.setattr(identity, "_FRAMES", 5)
    result = identity.train_and_evaluate(
        identity.Config(size=size, steps=500, mesh="data:1"), tmp_path
    )
    assert result["mse"] == 0


def test_a_wrong_value_names_its_flag():
    with pytest.raises(ValueError, match="--learning_rate"):
        identity.Config(learning_rate=0.0)
