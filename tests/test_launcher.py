import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest

pytest.importorskip("tensorboardX", reason="launchers need the extra train")

from line_task import Config, train_and_evaluate

from train import launcher

TESTS = pathlib.Path(__file__).parent


def start(folder, *arguments):
    """Runs the task as a user does, in an empty folder, under the suite's strict settings."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "line_task", *arguments],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def launch(monkeypatch, *arguments, run=train_and_evaluate):
    monkeypatch.setattr(sys, "argv", ["somewhere/line_task.py", *arguments])
    launcher.launch(Config, run)


def test_run_from_the_command_line(tmp_path):
    out, err = (process := start(tmp_path, "--steps=120", "--noisy")).communicate(timeout=60)
    assert process.returncode == 0, err
    figures = json.loads(out.splitlines()[-1])
    assert figures["steps"] == 120
    assert figures.keys() == {"steps", "train_seconds", "compile_seconds", "loss"}
    assert "120/120" in err
    (workdir,) = (tmp_path / "runs").iterdir()
    assert workdir.name.startswith("line_task-")
    config = json.loads((workdir / "config.json").read_text())
    assert config == dataclasses.asdict(Config(steps=120, noisy=True))


def test_help_tells_usage_and_every_flag(tmp_path):
    out, err = (process := start(tmp_path, "--help")).communicate(timeout=60)
    assert process.returncode == 0 and err == ""
    assert "python -m line_task --steps=100" in out
    for field in dataclasses.fields(Config):
        assert field.name in out and field.metadata["help"] in out
    assert "(default: '200')" in out and "--workdir" in out and "adam|sgd" in out
    assert not list(tmp_path.iterdir())


def test_ctrl_c_keeps_what_was_learned(tmp_path):
    process = start(tmp_path, "--steps=100000000", "--workdir=run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert f"interrupted after step {rows[-1]['step']} of" in err.splitlines()[-1]
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore((tmp_path / "run" / "params").absolute())
    assert params.keys() == {"kernel", "bias"} and np.isfinite(params["kernel"]).all()


def test_ctrl_c_before_the_first_step_leaves_at_once(tmp_path):
    process = start(tmp_path, "--workdir=run")
    assert process.stdout.readline() == "writing to run\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.split("\n")[-2] == "interrupted; see run" and "Traceback" not in err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--steps=0", "steps"),
        ("--steps=x", "steps"),
        ("--learning_rate=nan", "learning_rate"),
        ("--optimizer=adagrad", "adam|sgd"),
        ("--optimizer=sgd", "--optimizer=sgd needs --clip"),
        ("--noisy=maybe", "noisy"),
        ("--setps=3", "setps"),
        ("--workdir=taken", "taken is not empty"),
        ("--seed=4294967296", "--seed must be below 4294967296"),
        ("100", "100"),
    ],
)
def test_wrong_flag_is_one_line(argument, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").touch()
    with pytest.raises(SystemExit) as stop:
        launch(monkeypatch, argument)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [("--data_dir=nowhere", "nowhere: found none of"), ("--learning_rate=1e38", "at step")],
)
def test_failed_run_ends_in_one_line(argument, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        launch(monkeypatch, argument)
    assert stop.value.code == 1
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_may_be_used_again_where_no_run_began(monkeypatch, capsys, tmp_path):
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            launch(monkeypatch, "--data_dir=nowhere", f"--workdir={tmp_path}")
        assert stop.value.code == 1, capsys.readouterr().err
    launch(monkeypatch, f"--workdir={tmp_path}", run=lambda *_: {})


def test_flags_reach_the_task(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    seen = []
    arguments = ("--seed=3", "--steps=7", "--optimizer=sgd", "--clip=0.5", "--noisy", "--workdir=a")
    launch(monkeypatch, *arguments, run=lambda *given: seen.append(given) or {})
    expected = Config(seed=3, steps=7, optimizer="sgd", clip=0.5, noisy=True)
    assert seen == [(expected, pathlib.Path("a"))]


def test_figures_of_arrays_are_json(monkeypatch, capsys, tmp_path):
    launch(monkeypatch, f"--workdir={tmp_path}", run=lambda *_: {"error": np.float32(0.5)})
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"error": 0.5}


def test_default_workdirs_are_new(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        launch(monkeypatch, run=lambda *_: {})
    assert len(list((tmp_path / "runs").iterdir())) == 3


def test_config_checks_itself_without_flags():
    with pytest.raises(ValueError, match="--steps must be at least 1, got 0"):
        Config(steps=0)
