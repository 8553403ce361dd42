"""What a run may have to go through, many times over; not part of the suite, which has a few.

python tests/ordeals.py kills train.identity --size=8 --steps=20000
python tests/ordeals.py damage
python tests/ordeals.py lines
"""

import contextlib
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import logging

ROOT = pathlib.Path(__file__).parent.parent
KILLS, DAMAGES = 25, 200


def start(folder, task, *arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    return subprocess.Popen(
        [sys.executable, "-m", task, *arguments],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def checkpoint(folder):
    from train.checkpoints import Checkpoints  # noqa: PLC0415, starts JAX

    with contextlib.closing(Checkpoints(folder / "checkpoints", read_only=True)) as saved:
        return saved.restore()


def kills(folder, task, *arguments):
    """Kills a run at random moments and starts it again; compares it with an undisturbed one."""
    began = time.time()
    whole = start(folder, task, *arguments, "--workdir=whole")
    _, error = whole.communicate()
    assert whole.returncode == 0, error
    seconds = time.time() - began
    print(f"undisturbed: {seconds:.0f} s", flush=True)
    rng = random.Random(0)
    killed = most_left = 0
    while killed < KILLS:
        process = start(folder, task, *arguments, "--checkpoint_every=2s", "--workdir=run")
        # While it starts, or, three times of four, after it has said that it goes on.
        if killed % 4:
            process.stdout.readline()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0, max(3, seconds / 8)))
        if process.poll() is not None:
            print(f"it had ended before kill {killed + 1}: {process.stderr.read()[-300:]}")
            break
        process.kill()
        process.communicate()
        killed += 1
        left = list((folder / "run").rglob("*orbax-checkpoint-tmp*"))
        most_left = max(most_left, len([path for path in left if path.is_dir()]))
    process = start(folder, task, *arguments, "--workdir=run")
    _, error = process.communicate()
    assert process.returncode == 0 and "Traceback" not in error, error
    one, other = (checkpoint(folder / name) for name in ("run", "whole"))
    same = [np.array_equal(one.tree[name], other.tree[name]) for name in other.tree]
    lines = [(folder / name / "metrics.jsonl").read_text() for name in ("run", "whole")]
    rows = [json.loads(line) for line in lines[0].splitlines()]
    left = list((folder / "run").rglob("*orbax-checkpoint-tmp*"))
    print(
        f"{killed} kills: {sum(same)} of {len(same)} arrays the same at step {one.step}, "
        f"{len(rows)} lines of metrics, {'the same' if lines[0] == lines[1] else 'DIFFERENT'}; "
        f"temporary folders: {most_left} at most after a kill, {len(left)} in the end"
    )
    return all(same) and lines[0] == lines[1] and not left


def damage(folder):
    """Damages a checkpoint in many ways; what is restored must be right, or the one before."""
    from line_task import Config, train_and_evaluate  # noqa: PLC0415, starts JAX

    logging.set_verbosity(logging.ERROR)
    train_and_evaluate(Config(steps=150, checkpoint_every="50", keep=9), folder / "whole")
    right = checkpoint(folder / "whole").tree
    rng = random.Random(0)
    before, ok, wrong = 0, 0, 0
    for _ in range(DAMAGES):
        run = shutil.copytree(folder / "whole", folder / "run")
        files = sorted(p for p in (run / "checkpoints" / "150").rglob("*") if p.is_file())
        path = rng.choice(files)
        content = bytearray(path.read_bytes())
        how = rng.choice(("flipped", "truncated", "removed"))
        if how == "removed":
            path.unlink()
        elif content:
            place = rng.randrange(len(content))
            content[place] ^= 1 << rng.randrange(8)
            path.write_bytes(content[:place] if how == "truncated" else content)
        restored = checkpoint(run)
        if restored.step == 100:
            before += 1
        elif all(np.array_equal(restored.tree[name], x) for name, x in right.items()):
            ok += 1
        else:
            wrong += 1
            print(f"WRONG: {path} {how}")
        shutil.rmtree(run)
    print(f"{DAMAGES} damages: {before} times the one before, {ok} times right, {wrong} wrong")
    return wrong == 0


def main():
    what, *arguments = sys.argv[1:] or ["help"]
    if what not in ("kills", "damage"):
        sys.exit(__doc__)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(not globals()[what](pathlib.Path(folder), *arguments))


if __name__ == "__main__":
    main()
