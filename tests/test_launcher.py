import concurrent.futures
import dataclasses
import functools
import json
import os
import pathlib
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import time
import typing

import jax
import numpy as np
import pytest

pytest.importorskip("tensorboardX", reason="launchers need the extra train")

from line_task import Config, train_and_evaluate

from train import launcher, process, runs
from train.checkpoints import Checkpoints

TESTS = pathlib.Path(__file__).parent


def start(folder, *arguments, task="line_task", command=None):
    """Runs the task as a user does, in an empty folder, under the suite's strict settings."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
    }
    return subprocess.Popen(
        command or [sys.executable, "-m", task, *arguments],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def launch(monkeypatch, *arguments, run=train_and_evaluate):
    monkeypatch.setattr(sys, "argv", ["somewhere/line_task.py", *arguments])
    launcher.launch(Config, run)


def wait_for_rows(process, folder, count):
    metrics = folder / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and metrics.read_text().count("\n") >= count:
            return
        time.sleep(0.02)


def test_run_from_the_command_line(tmp_path):
    out, err = (process := start(tmp_path, "--steps=120", "--noisy")).communicate(timeout=60)
    assert process.returncode == 0, err
    figures = json.loads(out.splitlines()[-1])
    assert figures["steps"] == 120
    rates = {"steps_per_second", "examples_per_second"}
    assert figures.keys() == {"steps", "train_seconds", "compile_seconds", "loss", *rates}
    assert "120/120" in err
    (workdir,) = (tmp_path / "runs").iterdir()
    assert workdir.name.startswith("line_task-")
    config = json.loads((workdir / "config.json").read_text())
    assert config == dataclasses.asdict(Config(steps=120, noisy=True))
    results = json.loads((workdir / "results.json").read_text())
    assert results["figures"] == figures and results["command"].endswith("--steps=120 --noisy")
    assert {"git", "devices", "cores", "versions"} <= results.keys()
    assert (workdir / "picture").read_text() == "line"


def test_help_tells_usage_and_every_flag(tmp_path):
    out, err = (process := start(tmp_path, "--help")).communicate(timeout=60)
    assert process.returncode == 0 and err == ""
    assert "python -m line_task --steps=100" in out
    for field in dataclasses.fields(Config):
        assert field.name in out and field.metadata["help"] in " ".join(out.split())
    assert "(default: '200')" in out and "--workdir" in out and "adam|sgd" in out
    assert not list(tmp_path.iterdir())


def test_ctrl_c_while_it_begins_leaves_nothing(tmp_path):
    process = start(tmp_path, "--workdir=run", task="train.identity")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 130)
    assert "Traceback" not in err and not (tmp_path / "run").exists()


def test_a_run_that_is_killed_and_interrupted_ends_as_if_it_had_not_been(tmp_path):
    """Also with standard error closed, and standard output to a pipe that nobody reads."""
    arguments = ("--steps=3000", "--checkpoint_every=100")
    command = [sys.executable, "-m", "line_task", *arguments, "--workdir=whole"]
    shell = f"{shlex.join(command)} 2>&- | head -n 1"
    whole = start(tmp_path, command=["bash", "-c", f"set -o pipefail; {shell}"])
    run = tmp_path / "run"
    for signum, rows in ((signal.SIGKILL, 8), (signal.SIGINT, 20)):
        process = start(tmp_path, *arguments, "--workdir=run")
        wait_for_rows(process, run, rows)
        process.send_signal(signum)
        _, err = process.communicate(timeout=60)
        assert process.returncode in (-signal.SIGKILL, 128 + signal.SIGINT), err
        assert "Traceback" not in err
    step = [json.loads(line) for line in (run / "metrics.jsonl").open()][-1]["step"]
    assert f"interrupted after step {step} of 3000, which is saved" in err.splitlines()[-1]
    assert (run / "checkpoints" / str(step)).is_dir()
    model, config = runs.load_run(run)
    assert config.steps == 3000 and np.isfinite(model.kernel[...]).all()
    out, err = (process := start(tmp_path, "--workdir=run")).communicate(timeout=60)
    assert process.returncode == 0 and out.startswith("continuing run from step"), err
    assert whole.communicate(timeout=60)[0] == "writing to whole\n" and whole.returncode == 0
    for folder in ("run", "whole"):
        json.loads((tmp_path / folder / "results.json").read_text())
    lines = [(tmp_path / folder / "metrics.jsonl").read_text() for folder in ("run", "whole")]
    assert lines[0] == lines[1] and len(set(lines[0].splitlines())) == 3000 / 50 + 1
    saved = [
        Checkpoints(tmp_path / folder / "checkpoints", read_only=True).restore().tree
        for folder in ("run", "whole")
    ]
    jax.tree.map(np.testing.assert_array_equal, *saved)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--steps=0", "steps"),
        ("--steps=x", "steps"),
        ("--steps=3000000000", "--steps must be below 2147483648"),
        ("--learning_rate=nan", "learning_rate"),
        ("--learning_rate=inf", "--learning_rate must be finite"),
        ("--clip=-inf", "--clip must be finite"),
        ("--optimizer=adagrad", "adam|sgd"),
        ("--optimizer=sgd", "--optimizer=sgd needs --clip"),
        ("--noisy=maybe", "noisy"),
        ("--nonoisy=1", "noisy"),
        ("--setps=3", "setps"),
        ("--workdir=taken", "taken is not empty"),
        ("--workdir=taken/mine", "mine"),
        ("--workdir=taken/mine/run", "mine"),
        ("--workdir=gs://bucket/run", "must be a folder of this machine"),
        ("--workdir=~nobody-has-this-name/run", "--workdir"),
        ("--mode=eval", "--mode=eval needs --workdir"),
        ("--checkpoint_every=often", "--checkpoint_every must be"),
        ("--checkpoint_every=0m", "--checkpoint_every must be"),
        ("--keep=0", "--keep"),
        ("--mesh=data", "--mesh must be like"),
        ("--mesh=data:2,data:2", "--mesh must be like"),
        ("--distributed=here", "--distributed must be auto or HOST:PORT,N,I"),
        ("--distributed=auto", "--distributed needs --workdir"),
        ("--mesh=data:64", "want 64 devices, have 8"),
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
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "mine"]


def test_all_wrong_flags_are_told_at_once(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        launch(monkeypatch, "--steps=x", "--learning_rate", "-1", "--keep=0", "--nope", "word")
    error = capsys.readouterr().err
    wrong = ("--steps=x", "--learning_rate=-1", "--keep=0", "'nope'", "'word'")
    assert all(word in error for word in wrong) and error.count("\n") == 1


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


def test_data_that_cannot_be_used_leave_no_folder(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        launch(monkeypatch, "--data_dir=nowhere", f"--workdir={tmp_path / 'run'}")
    assert stop.value.code == 1, capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_is_continued_with_its_flags_and_evaluated(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    launch(monkeypatch, "--steps=60", "--seed=5", "--workdir=run")
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in ("picture", "results.json"):
        (tmp_path / "run" / name).unlink()
    launch(monkeypatch, "--mode=eval", "--workdir=run")
    out = capsys.readouterr().out.splitlines()
    assert "nothing to train" in out[0] and json.loads(out[-1]) == first
    assert (tmp_path / "run" / "picture").exists()
    launch(monkeypatch, "--steps=70", "--workdir=run", "--keep=3")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 70
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 5
    for argument in ("--seed=0", "--steps=65"):
        with pytest.raises(SystemExit) as stop:
            launch(monkeypatch, argument, "--workdir=run")
        assert stop.value.code == 2
        assert f"another run: {argument} (the run: " in capsys.readouterr().err
    with runs.owned(tmp_path / "run"), pytest.raises(SystemExit) as stop:
        threaded(lambda: launch(monkeypatch, "--workdir=run"))
    assert "is in use by another run" in capsys.readouterr().err


def threaded(function):
    """Calls a function in another thread, where signals cannot be handled."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return pool.submit(function).result()


def test_a_folder_that_cannot_be_written_to_ends_in_one_line(monkeypatch, capsys, tmp_path):
    """Not even half of a run is lost by it: what is saved is named."""

    def run(config, workdir):
        (workdir / ".picture").mkdir(parents=True)
        (workdir / "results.json").mkdir()
        return train_and_evaluate(config, workdir)

    with pytest.raises(SystemExit) as stop:
        launch(monkeypatch, f"--workdir={tmp_path / 'run'}", "--steps=10", run=run)
    assert stop.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"see {tmp_path / 'run'}")
    assert (tmp_path / "run" / "params").is_dir()


def test_pictures_that_cannot_be_written_leave_the_figures(monkeypatch, capsys, tmp_path):
    def run(config, workdir):
        workdir.mkdir()
        (workdir / "picture").mkdir()
        return train_and_evaluate(config, workdir)

    with pytest.raises(SystemExit) as stop:
        launch(monkeypatch, f"--workdir={tmp_path / 'run'}", "--steps=10", run=run)
    captured = capsys.readouterr()
    assert stop.value.code == 1 and json.loads(captured.out.splitlines()[-1])["steps"] == 10
    assert "the model and its figures are in" in captured.err.splitlines()[-1]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["figures"]["steps"] == 10


def test_a_full_disk_names_the_model_there_is(monkeypatch, capsys, tmp_path):
    """A limit on the size of files stands for it: that of metrics is the first to be reached."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        options = ("--steps=100000", "--checkpoint_every=2000", f"--workdir={tmp_path / 'run'}")
        with pytest.raises(SystemExit) as stop:
            launch(monkeypatch, *options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and "File too large" in error
    step, folder = re.search(r"the model of step (\d+) is (.*)$", error).groups()
    assert int(step) > 0 and pathlib.Path(folder).is_dir()
    assert runs.load_run(tmp_path / "run")[1].steps == 100000


@pytest.mark.parametrize("signum", process.SIGNALS)
def test_the_first_signal_waits_for_the_steps_under_way_of_a_launched_run(request, signum):
    # Under nohup, or in the background of a script, a signal may be ignored from the beginning.
    before = signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL
    request.addfinalizer(functools.partial(signal.signal, signum, signal.signal(signum, before)))
    with runs.session(), process.deferred_signals() as signals:
        os.kill(os.getpid(), signum)
        assert signals == [signum] and signal.getsignal(signum) == before
    with process.deferred_signals():
        assert signal.getsignal(signum) == before


@pytest.mark.slow
def test_two_processes_are_as_one_and_one_goes_on_alone(tmp_path):
    """Each computes half of a batch; killed, the run is continued on another number of hosts."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = ("--steps=1500", "--checkpoint_every=50", "--workdir=run")
    both = [start(tmp_path, *arguments, f"--distributed=localhost:{port},2,{i}") for i in range(2)]
    wait_for_rows(both[0], tmp_path / "run", 5)
    for one in reversed(both):
        one.kill()
        assert one.wait() == -signal.SIGKILL, one.communicate()[1]
    step = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert 200 <= step < 1500
    config = Config(steps=1500, mesh="data:1")
    train_and_evaluate(config, tmp_path / "run")
    train_and_evaluate(config, tmp_path / "one")
    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("run", "one")
    ]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for row, expected in zip(*rows, strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_streams_that_fail_end_nothing(monkeypatch):
    # It is never closed: that would fail, too.
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))  # noqa: SIM115
    process.outlive_streams()
    print("x" * 100_000, flush=True)
    sys.stdout.flush()


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
    seen = []
    for _ in range(3):
        launch(monkeypatch, run=lambda config, workdir: seen.append(workdir) or {})
    assert len(set(seen)) == 3 and not list(tmp_path.iterdir())


def test_config_checks_itself_without_flags():
    with pytest.raises(ValueError, match="--steps must be at least 1, got 0"):
        Config(steps=0)


@dataclasses.dataclass(frozen=True)
class Derived(Config):
    """With defaults that other flags decide, and flags that others make useless."""

    kernels_only: typing.ClassVar = {"kind": ["sparse"]}

    kind: str = launcher.flag("sparse", "Kind.")
    width: int = launcher.flag(lambda config: 2 * config.steps, "Twice --steps.", minimum=1)
    num_local: int = launcher.flag(2, "Points.", minimum=0)
    region: int = launcher.flag(8, "Near.", minimum=1, only={"num_local": bool})


def test_a_default_may_be_made_of_other_flags(monkeypatch, capsys):
    assert Derived(steps=3).width == 6 and Derived(steps=3, width=5).width == 5
    assert dataclasses.asdict(Derived(steps=3))["width"] == 6
    seen = []
    monkeypatch.setattr(sys, "argv", ["task", "--steps=4", "--num_local=0"])
    launcher.launch(Derived, lambda config, workdir: seen.append(config) or {})
    assert seen == [Derived(steps=4, num_local=0, width=8)]
    monkeypatch.setattr(sys, "argv", ["task", "--width=0"])
    with pytest.raises(SystemExit):
        launcher.launch(Derived, lambda config, workdir: {})
    assert "width" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_local": 0, "region": 3}, "--region has no effect with --num_local=0"),
        ({"kind": "dense", "implementation": "cpu"}, "--implementation has no effect with --kind"),
        ({"mesh": "seq:2"}, "--mesh: there are no sequences to divide"),
        ({"mesh": "data:2,data:2"}, "each axis once"),
    ],
)
def test_flags_without_effect_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Derived(**values)
