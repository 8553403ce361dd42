"""Accuracy against density: layers that learn which of their weights exist, and all baselines.

Runs `python -m train.sparse` with every method at every density, ten minutes with the defaults, and
writes what they return to `runs.jsonl`, and `accuracy.png`, in a folder:

  python -m benchmarks.densities --out=runs/densities --seeds=5
  python -m benchmarks.densities --out=runs/mnist --densities=0.01,0.1 -- --dataset=mnist ...

What follows `--` are further flags of `train.sparse`. Where `JAX_COMPILATION_CACHE_DIR` names a
folder, all seeds of a method and density are compiled once.
"""

import itertools
import json
import pathlib
import subprocess
import sys
import typing
from typing import Any

import numpy as np
from absl import app, flags
from matplotlib.figure import Figure

from benchmarks import command
from train import figures, sparse


def run(method: str, density: float, seeds: int, others: list[str], out: pathlib.Path):
    """The figures of one command."""
    folder = out / f"{method}-{density:g}"
    command = ["-m", "train.sparse", f"--method={method}", f"--seeds={seeds}"]
    command += [f"--workdir={folder}", *others]
    if method != "dense":
        command.append(f"--density={density:g}")
    child = subprocess.run(
        [sys.executable, *command], stdout=subprocess.PIPE, text=True, check=False
    )
    if child.returncode:
        sys.exit(child.returncode)  # It has said why.
    result = json.loads(child.stdout.splitlines()[-1])
    return {"method": method, "asked": density, **result}


def draw(runs: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Draws accuracy against density, a line for each method."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == method]
        accuracy = [run["accuracy"] for run in own]
        if method == "dense":
            axes.axhline(accuracy[0], color="gray", linestyle=":", label="dense")
            continue
        spread = [np.std(run["accuracies"]) for run in own]
        density = [run["density"] for run in own]
        axes.errorbar(density, accuracy, spread, marker="o", capsize=3, label=method)
    axes.set(xscale="log", xlabel="density", ylabel="accuracy on test images")
    axes.legend()
    figures.save_png(figure, path)


def main(argv):
    values = flags.FLAGS
    out = pathlib.Path(values.out).expanduser()
    if out.exists():
        raise app.UsageError(f"--out: {out} exists, want a new folder")
    densities = list(map(float, values.densities))
    # What is dense has no density to vary.
    combinations = [("dense", densities[-1])] if "dense" in values.methods else []
    sparse_ones = [method for method in values.methods if method != "dense"]
    combinations += itertools.product(sparse_ones, densities)
    runs = []
    for method, density in combinations:
        runs.append(run(method, density, values.seeds, argv[1:], out))
        with open(out / "runs.jsonl", "a") as lines:
            lines.write(json.dumps(runs[-1]) + "\n")
        mean, accuracies = runs[-1]["accuracy"], runs[-1]["accuracies"]
        spread, least = np.std(accuracies, ddof=len(accuracies) > 1), min(accuracies)
        print(f"{method} {density:g}: {mean:.4f} +- {spread:.4f}, least {least:.4f}", flush=True)
    draw(runs, out / "accuracy.png")


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "New folder to write to.", required=True)
    command.define_numbers(
        "densities", [0.01, 0.05, 0.1], "Parts of the weights that exist.", kind=float, below=1
    )
    command.define_choices("methods", typing.get_args(sparse.Method), "Of train.sparse.")
    flags.DEFINE_integer("seeds", 5, "Runs of each.", lower_bound=1)
    command.run(main, arguments=None)
