"""Pictures and animations on disk, from `matplotlib.figure.Figure` and without pyplot's state."""

import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure


def save_png(figure: Figure, path: pathlib.Path) -> None:
    """Writes a figure to `path`, which never holds half a picture."""
    hidden = path.with_name(f".{path.name}")
    figure.savefig(hidden, format="png")
    os.replace(hidden, path)


def save_gif(
    figure: Figure,
    draw: Callable[[Any], object],
    frames: Iterable,
    path: pathlib.Path,
    *,
    frames_per_second: int = 15,
) -> None:
    """Writes an animation to `path`, which never holds half of one.

    Args:
      figure: what `draw` draws on.
      draw: called with each frame in turn, changes the figure.
      frames: whatever `draw` understands.
      path: ends in `.gif`.
      frames_per_second: speed of the animation.
    """
    hidden = path.with_name(f".{path.name}")
    animation = FuncAnimation(figure, draw, list(frames), init_func=lambda: None)
    animation.save(hidden, writer=PillowWriter(fps=frames_per_second))
    os.replace(hidden, path)
