"""What the README shows runs as it stands there."""

import pathlib
import re
import shlex
import sys

import jax
import pytest

pytest.importorskip("tensorboardX", reason="launchers need the extra train")

from train import glimpse, identity, launcher, sort, sparse, transformer

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()


def test_its_python_runs_from_top_to_bottom():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    scope = {}
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        for block in blocks:
            exec(block, scope)
    assert scope["y"].shape == (8, 50)
    assert scope["evaluate"].layer.deterministic and not scope["layer"].layer.deterministic


def test_its_functional_example_has_eight_lines():
    example = re.search(r"```python\nimport jax\n(.*?)```", README, re.DOTALL).group(1)
    assert len([line for line in example.splitlines()[1:] if line]) == 8 - 1


def test_its_commands_are_understood(tmp_path, monkeypatch, capsys):
    """Every launcher reads the flags that stand in the README; what it would do is left out."""
    tasks = {
        "train.sort": sort.Config,
        "train.sparse": sparse.Config,
        "train.identity": identity.Config,
        "train.glimpse": glimpse.Config,
        "train.transformer": transformer.Config,
    }
    commands = re.findall(r"python -m (train\.\w+)((?: --[\w=.]+)*)", README)
    assert {name for name, _ in commands} == set(tasks)
    monkeypatch.chdir(tmp_path)
    for name, flags in commands:
        monkeypatch.setattr(sys, "argv", [name, *shlex.split(flags)])
        if "--help" in flags:
            with pytest.raises(SystemExit, match="0"):
                launcher.launch(tasks[name], lambda config, workdir: {})
        else:
            launcher.launch(tasks[name], lambda config, workdir: {"steps": config.steps})
            assert "steps" in capsys.readouterr().out


def test_its_pictures_and_pages_exist():
    targets = re.findall(r"\]\((?!https)([^)#]+)\)", README)
    assert targets
    assert all((pathlib.Path(__file__).parent.parent / target).exists() for target in targets)
