"""Trains a language model whose layers attend to few bytes, at positions that some of them learn.

The default run reads the sources of Python's standard library, which are on every machine; it takes
a few minutes on two CPU cores. It reports bits per byte of held-out text beside those of models
that count, continues a text, and draws where each layer looks.

The other tasks have one right answer. Which token stood `--offset` places ago? A single layer has
to find a position of which it is told nothing. Which value stood next to this key, of `--pairs`?
No distance tells, only what stands there.

  python -m train.transformer
  python -m train.transformer --layers=dddd
  python -m train.transformer --corpus=FILE_OR_FOLDER --length=512
  python -m train.transformer --task=offset --offset=100
  python -m train.transformer --task=recall --length=256 --pairs=64 --layers=wc
"""

import pathlib
from typing import Any

from train import language, launcher, offset, recall
from train.transformer_config import Config

_TASKS = {
    "text": language.train_and_evaluate,
    "offset": offset.train_and_evaluate,
    "recall": recall.train_and_evaluate,
}


def train_and_evaluate(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs the task that the config names, and returns its figures."""
    return _TASKS[config.task](config, workdir)


if __name__ == "__main__":
    launcher.launch(Config, train_and_evaluate)
