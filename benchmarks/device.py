"""Proves and measures everything on the device of this machine, in two commands.

  python -m benchmarks.device prove --out=proved
  python -m benchmarks.device measure --out=measured

From the root of a clone, which need not be installed. Each takes at most 300 seconds; docs/gpu.md
says what they do. Where there is no GPU, both only try themselves out at a small scale.
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

from absl import app, flags

from benchmarks import command

_ROOT = pathlib.Path(__file__).parents[1]
# Parts in the order in which they run, with their shares of the budget.
_PARTS = {
    "prove": {"smoke": 10, "real": 70, "contract": 60, "suite": 150},
    "measure": {
        "smoke": 8,
        "block": 55,
        "modules": 105,
        "products": 35,
        "sort": 20,
        "sparse": 15,
        "gathered": 32,
        "redistribution": 15,
        "torch": 40,
    },
}
# After its share a part begins no case; so many seconds later, or after all are due, it is ended.
_GRACE, _LAST_GRACE = 20, 8
_WORKERS = 15


def link() -> None:
    """Makes `hyperlayer_jax/kernels` lead to `kernels`, should a copy have lost the link."""
    path = _ROOT / "hyperlayer_jax" / "kernels"
    if not (path / "__init__.py").exists():
        if path.is_symlink() or path.is_file():
            path.unlink()
        path.symlink_to(pathlib.Path("..", "kernels"), target_is_directory=True)


def command_of(part: str, out: pathlib.Path, rows: str, small: bool, seconds: float) -> list[str]:
    """The command line of a part."""
    if part in ("contract", "suite"):
        return [sys.executable, "-m", "pytest", *_pytest(part, small)]
    module = "benchmarks.proof" if part in ("smoke", "real") else "benchmarks.run"
    return [
        sys.executable,
        "-m",
        module,
        f"--only={part}",
        f"--rows={out / rows}",
        f"--budget_s={seconds:.0f}",
        f"--scale={'small' if small else 'full'}",
    ]


def _pytest(part, small):
    """The tests of the kernels, or all. A small scale runs a few, and looks whether all load."""
    files = sorted(str(path) for path in (_ROOT / "tests").glob("test_kernels*.py"))
    assert files
    if part != "contract":
        files = []
    if not small:
        return ["-v", "--tb=short", "-n", str(_WORKERS), *files]
    if part == "contract":
        return ["-q", "--quick", "-k", "oracle", *files]
    return ["-q", "--collect-only"]


def run(words: list[str], log: pathlib.Path, seconds: float) -> int | None:
    """Runs a command line, its output added to `log`; ends it after `seconds`: None then."""
    env = os.environ | {
        "BENCHMARKS_COMMAND": command.line(),
        "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    if "pytest" in words:
        # Workers share the memory of the device.
        env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    with log.open("ab") as file:
        child = subprocess.Popen(
            words, stdout=file, stderr=file, env=env, cwd=_ROOT, start_new_session=True
        )
        try:
            return child.wait(seconds)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGINT)  # pytest tells then what it has found.
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(5)
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def main(arguments: list[str]) -> None:
    """Runs the parts of a command one after the other, and says how each ended."""
    values, name = flags.FLAGS, arguments[1]
    if name not in _PARTS:
        raise app.UsageError(f"Want one of {', '.join(_PARTS)}, got {arguments[1:]}")
    parts = _PARTS[name]
    chosen = values.only or list(parts)
    if unknown := set(chosen) - set(parts):
        raise app.UsageError(f"--only: got {', '.join(unknown)}, want some of {', '.join(parts)}")
    folder = values.out or os.environ.get("OUT")
    if folder is None:
        raise app.UsageError("--out: got none, and $OUT is not set, want a folder")
    out = pathlib.Path(folder).absolute()
    out.mkdir(parents=True, exist_ok=True)
    small = values.scale == "small" if values.scale else shutil.which("nvidia-smi") is None
    link()

    start, failed = time.monotonic(), []
    total, due = sum(parts[part] for part in chosen), 0
    for part in chosen:
        due += values.budget_s * parts[part] / total
        began = time.monotonic()
        share = start + due - began
        limit = min(share + _GRACE, start + values.budget_s + _LAST_GRACE - began)
        log = out / f"{name}.txt"
        line = command_of(part, out, f"{name}.jsonl", small, max(1, share))
        code = run(line, log, max(1, limit))
        took = time.monotonic() - began
        ended = "out of time" if code is None else "ok" if code == 0 else f"failed ({code})"
        last = log.read_text(errors="replace").splitlines()
        if part in ("contract", "suite"):
            ended += f": {last[-1].strip('= ')}" if last else ""
        row = {"part": part, "ended": ended, "seconds": round(took, 1)}
        with (out / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"== {part}: {ended}, {took:.0f} s", flush=True)
        if code or (code is None and name == "prove"):
            failed.append(part)
            print("\n".join(last[-40:]))
        if part == "smoke" and code:
            break
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "Folder for the results; by default $OUT.")
    flags.DEFINE_list("only", None, "Parts to run; by default all of the command.")
    flags.DEFINE_float("budget_s", 290, "Seconds for all parts.", lower_bound=1, upper_bound=1e6)
    flags.DEFINE_enum(
        "scale", None, ["full", "small"], "By default full where there is a GPU, else small."
    )
    command.run(main, arguments=1)
