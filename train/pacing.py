"""When something is due in a run."""

import contextlib
import pathlib
import time
from collections.abc import Iterator

import jax

from train import devices
from train.config import Config


class Pacemaker:
    """Says when to save, as `--checkpoint_every` has it."""

    def __init__(self, config: Config, step: int):
        self._steps, self._seconds = config.checkpoint_interval()
        self._last = step, time.monotonic()

    def is_due(self, step: int, is_best: bool) -> bool:
        """Whether a checkpoint is to be saved at a step, and with it the next wait begins."""
        last_step, last_time = self._last
        late = devices.agree(time.monotonic() - last_time >= self._seconds)
        due = is_best or late or step - last_step >= self._steps
        if due:
            self._last = step, time.monotonic()
        return due


def next_multiple(step: int, interval: int) -> int:
    """The first multiple of an interval behind a step."""
    return (step // interval + 1) * interval


def traces(config: Config, workdir: pathlib.Path) -> Iterator[contextlib.AbstractContextManager]:
    """For each line of metrics, what surrounds its steps: those of the second are traced."""
    yield contextlib.nullcontext()
    if config.profile:
        yield jax.profiler.trace(str(workdir / "profile"), create_perfetto_trace=True)
    while True:
        yield contextlib.nullcontext()
