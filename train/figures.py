"""Pictures and animations on disk, from `matplotlib.figure.Figure` and without pyplot's state."""

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure


def save_png(figure: Figure, path: pathlib.Path) -> None:
    """Writes a figure to `path`, which never holds half a picture, and says so."""
    hidden = path.with_name(f".{path.name}")
    figure.savefig(hidden, format="png")
    _put(hidden, path)


def save_gif(
    figure: Figure,
    draw: Callable[[Any], object],
    frames: Sequence,
    path: pathlib.Path,
    *,
    frames_per_second: int = 15,
) -> None:
    """Writes an animation to `path`, which never holds half of one, and says so.

    Args:
      figure: what `draw` draws on. All frames have the layout of the first: to find it anew would
        take as long as drawing them.
      draw: called with each frame in turn, changes the figure.
      frames: whatever `draw` understands.
      path: ends in `.gif`.
      frames_per_second: speed of the animation.
    """
    hidden = path.with_name(f".{path.name}")
    draw(frames[0])
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    animation = FuncAnimation(figure, draw, frames, init_func=lambda: None)
    animation.save(hidden, writer=PillowWriter(fps=frames_per_second))
    _put(hidden, path)


def _put(hidden: pathlib.Path, path: pathlib.Path) -> None:
    os.replace(hidden, path)
    print(f"picture: {path}", flush=True)
