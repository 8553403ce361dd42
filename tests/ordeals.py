# ruff: noqa: E501
"""What a run may have to go through, many times over; not part of the suite, which has a few.

python tests/ordeals.py kills train.identity --size=8 --steps=20000
python tests/ordeals.py damage
python tests/ordeals.py cost
python tests/ordeals.py lines
python tests/ordeals.py lines benchmarks.run train.sort
"""

import contextlib
import json
import os
import pathlib
import random
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import typing
import warnings

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


# What models are made from, beside the default config.
INPUTS = {
    "train.sort": (64,), "train.sparse": (64,), "train.identity": (), "train.glimpse": (1,),
    "train.transformer_config": (),
}  # fmt: skip
EVERY, SHARE = 30, 0.02


def cost(folder):
    """The processor time of a checkpoint of every default run, as a share of half a minute."""
    import importlib  # noqa: PLC0415

    import jax  # noqa: PLC0415
    from flax import nnx  # noqa: PLC0415

    from train.checkpoints import Checkpoints  # noqa: PLC0415

    logging.set_verbosity(logging.ERROR)
    most = 0
    for name, inputs in INPUTS.items():
        task = importlib.import_module(name)
        params = nnx.state(task.make_model(task.Config(), *inputs), nnx.Param)
        # With two moments of each, and a mean.
        state = dict.fromkeys(("params", "mu", "nu", "average"), params)
        seconds = []
        with contextlib.closing(Checkpoints(folder / name)) as saved:
            for step in range(1, 6):
                began = time.process_time()
                saved.save(step, state, {})
                saved.wait()
                seconds.append(time.process_time() - began)
        share = statistics.median(seconds) / EVERY
        most = max(most, share)
        count = sum(x.size for x in jax.tree.leaves(params))
        print(f"{name}: {count} parameters, {share:.2%} of {EVERY} s for a checkpoint", flush=True)
    return most < SHARE


WORDS = {
    "train.sort": (
        "--dataset=cifar", "--dataset=digits --data_dir=.", "--dataset=mnist --data_dir=nowhere",
        "--dataset=mnist --data_dir=~nobody-has-this-name", "--loss=x", "--proposal=", "--augment=2",
        "--size=400", "--digits=10", "--digits=9 --size=60", "--size=65535 --digits=9",
        "--batch_size=1000000 --size=100", "--width=65535", "--mesh=data:2", "--mesh=model:0",
        "--mesh=seq:1", "--checkpoint_every=1d", "--checkpoint_every=-5", "--mode=test",
        "--mode=eval", "--mode=eval --workdir=nowhere", "--workdir=/proc/run", "--workdir=/dev/null",
        "--workdir=s3://bucket", "--distributed=1,2", "--distributed=auto", "--resume", "sort", "-x",
        "--seed=1.5", "--steps=1e3", "--steps", "--keep=-1", "--profile=maybe", "--noprofile=no",
    ),
    "train.sparse": (
        "--hidden=", "--hidden=0", "--hidden=3,x", "--hidden=99999999", "--density=1.1",
        "--fraction=2", "--until=2", "--method=x", "--method=dense --density=0.1",
        "--method=random --every=3", "--method=magnitude --fraction=0.1", "--every=1",
        "--method=dense --implementation=cpu", "--seed=4294967295 --seeds=2", "--data_dir=.",
        "--dataset=kmnist --data_dir=nowhere", "--mesh=seq:2", "--batch_size=1000000 --hidden=60000",
    ),
    "train.identity": (
        "--size=16000000", "--size=5000000", "--region=99 --size=4 --num_local=2147483647",
        "--dataset=digits", "--mesh=data:64", "--mesh=data:1,model:1,data:1", "--sigma_penalty=x",
    ),
    "train.glimpse": (
        "--model=resnet", "--head=x", "--model=conv --head=conv", "--model=conv --glimpses=3",
        "--model=stn --num_local=2", "--model=reinforce --sigma_scale=1", "--dataset=mnist_",
        "--data_dir=.", "--canvas=33", "--canvas=8", "--patch_size=20", "--scaling=1",
        "--augment_scaling=1", "--scaling=0.5 --augment_scaling=0.5", "--canvas=8190", "--digit_size=4002 --canvas=4002",
        "--canvas=2000 --batch_size=100000 --coarseness=1", "--candidates=300", "--scored=5",
        "--model=conv --coarseness=2", "--model=stn --implementation=cpu", "--eval_patches=9",
        "--eval_canvas=9000", "--eval_canvas=12", "--model=box --eval_canvas=256",
    ),
    "train.transformer": (
        "--num_local=0 --region=3", "--layers=dd --implementation=cpu", "--mesh=seq:3",
        "--task=speech", "--corpus=/nowhere", "--corpus=nowhere.txt", "--corpus=", "--corpus=a/b.gz",
        "--corpus=~nobody-has-this-name", "--layers=x", "--layers=", "--positions=x", "--offset=3",
        "--task=offset --offset=300 --length=200", "--task=offset --corpus=stdlib2",
        "--task=offset --temperature=1", "--task=offset --data_dir=.", "--num_heads=3",
        "--features=3", "--num_tuples=300", "--num_tuples=100000000", "--length=10000000",
        "--corpus=/dev/zero", "--corpus=/proc/self/mem", "--layers=d --length=60000",
        "--layers=s --batch_size=1000000",
    ),
    "benchmarks.run": (
        "--out=nowhere/out.json", "--out=.", "--out=/dev/null", "--out=/proc/out", "--rows=.",
        "--rows=nowhere/rows.jsonl", "--only=", "--only=block,blocks", "--only", "--budget_s=-1",
        "--budget_s=nan", "--budget_s=inf", "--budget_s=x", "--scale=large", "--nope", "word",
        "--out=out.json --rows=nowhere/rows", "--out=out.json word",
    ),
    "benchmarks.table": (
        "", "one", "one two three", "nowhere.json page.md", ". page.md", "/dev/null page.md",
        "/proc/self/status page.md", "--nope one two",
    ),
    "benchmarks.device": (
        "", "provee", "prove measure", "prove --only=x", "prove --budget_s=0", "prove --scale=x",
        "prove", "prove --out=/dev/null/x", "prove --budget_s=nan --out=/proc/x",
    ),
    "benchmarks.scale": (
        "--topology=v5e", "--topology=", "--mesh=data:3", "--mesh=data:2,seq:3", "--mesh=x",
        "--length=0", "--features=0", "--layers=x", "--batch_size=0", "--largest=depth",
        "--out=nowhere/x", "word",
    ),
    "benchmarks.known": ("--beds=x", "--beds=", "--seeds=0", "--inputs=3", "--outputs=0", "word"),
    "benchmarks.recall": (
        "--task=x", "--patterns=x", "--patterns=", "--pairs=64", "--longest=64", "--longest=2048",
        "--seeds=0", "--steps=0", "--length=1", "--learning_rate=-1", "word",
    ),
    "benchmarks.language": (
        "--layers=x", "--layers=", "--corpus=nowhere/x", "--length=1", "--length=99999999",
        "--seeds=0", "--steps=0", "--every=0", "--learning_rate=-1", "--test_bytes=1", "word",
    ),
    "benchmarks.sort": (
        "--protocol=x", "--sizes=0", "--sizes=", "--sizes=x", "--methods=x", "--supervision=x",
        "--factors=0", "--factors=nan", "--protocol=mnist4 --data_dir=nowhere", "--out=nowhere/x",
        "--learning_rate=nan", "word",
    ),
    "benchmarks.sort_speed": ("--sizes=0", "--sizes=x", "--scale=large", "--features=3", "word"),
    "benchmarks.densities": (
        "", "--out=/proc", "--out=x --densities=0", "--out=x --densities=1.5", "--out=x --seeds=0",
        "--out=x --densities=a", "--out=x --methods=y", "--out=x --methods=", "--out=x --nope",
    ),
}  # fmt: skip


def bad_lines(name, module):
    """Command lines, without the name, that a launcher or benchmark must refuse."""
    fields = typing.get_type_hints(module.Config) if hasattr(module, "train_and_evaluate") else {}
    for field, hint in fields.items():
        kinds = {hint, *typing.get_args(hint)}
        values = ("-1", "x", "99999999999") if int in kinds else ("-1", "nan", "inf", "x")
        if kinds & {int, float}:
            yield from ([f"--{field}={value}"] for value in values)
    yield from (line.split() for line in WORDS[name])


def run_forked(name, arguments, folder):
    """Runs a command in an empty folder: its exit status, what it said, and what it left."""
    err, here = folder / "err", folder / "here"
    here.mkdir()
    # Nothing has started JAX yet: a copy of this process is as good as a new one, and quicker.
    child = os.fork()
    if child == 0:
        for path, number in ((os.devnull, 1), (err, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(here)
        sys.argv = [name, *arguments]
        warnings.simplefilter("ignore")
        status = 0
        try:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            status = stop.code
            if isinstance(status, str):
                print(status, file=sys.stderr)
                status = 1
        except BaseException:
            traceback.print_exc()
            status = 99
        sys.stderr.flush()
        os._exit(status or 0)
    began = time.time()
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.time() - began > 180:
            os.kill(child, 9)
        time.sleep(0.02)
    left = [path.name for path in here.iterdir()]
    shutil.rmtree(here)
    return os.waitstatus_to_exitcode(ended[1]), err.read_text(errors="replace").strip(), left


def lines(folder, *names):
    """Every bad command line ends in one line, which names a flag, and leaves nothing behind."""
    import importlib  # noqa: PLC0415

    modules = {name: importlib.import_module(name) for name in names or WORDS}
    wrong = count = 0
    for name, module in modules.items():
        for arguments in bad_lines(name, module):
            count += 1
            status, said, left = run_forked(name, arguments, folder)
            if status not in (1, 2) or "Traceback" in said or said.count("\n") > 1 or left:
                wrong += 1
                print(f"{name} {' '.join(arguments)}: {status} {said[-300:]!r} {left}", flush=True)
    print(f"{count} bad lines: {wrong} that did not end in one clear line")
    return wrong == 0


def main():
    what, *arguments = sys.argv[1:] or ["help"]
    if what not in ("kills", "damage", "cost", "lines"):
        sys.exit(__doc__)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(not globals()[what](pathlib.Path(folder), *arguments))


if __name__ == "__main__":
    main()
