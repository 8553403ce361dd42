"""Pictures of glimpses: where a model looks, and what it reads there."""

import pathlib
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse, Rectangle

from hyperlayer_jax.nn import Glimpses
from train import figures

# What is drawn is kept of every evaluation.
DRAWN = ("patches", "means", "sigmas", "log_chances")
_BEST = 3


def arrays(glimpses: Glimpses | None) -> dict[str, jax.Array]:
    """What of glimpses is drawn."""
    named = {name: getattr(glimpses, name, None) for name in DRAWN}
    return {name: array for name, array in named.items() if array is not None}


def draw_glimpses(
    figure: Figure, images: np.ndarray, coarse: np.ndarray, glimpses: Glimpses, title: str
) -> None:
    """Draws a row for each image: glimpses on it, what it decided by, and what it read.

    A glimpse has one colour. Its ellipse spans a sigma around the centre. Where glimpses have
    chances, they are as opaque as they are likely, and the likeliest are shown.
    """
    figure.clear()
    figure.suptitle(title)
    chances = glimpses.log_chances
    count = glimpses.patches.shape[1]
    shown = count if chances is None else min(_BEST, count)
    axes = figure.subplots(len(images), 2 + shown, squeeze=False)
    for i, row in enumerate(axes):
        order = np.arange(count) if chances is None else np.argsort(-chances[i])
        read = [glimpses.patches[i, g] for g in order[:shown]]
        for ax, pixels in zip(row, [images[i], coarse[i], *read], strict=True):
            ax.imshow(pixels, cmap="gray", vmin=0, vmax=1 if pixels is not coarse[i] else None)
            ax.set(xticks=[], yticks=[])
        for rank, g in enumerate(order):
            colour = f"C{rank}" if rank < shown else "white"
            _draw_place(row[0], glimpses.means[i, g], glimpses.sigmas[i, g], colour)
            if rank < shown:
                row[2 + rank].spines[:].set(color=colour, linewidth=2)
                if chances is not None:
                    row[2 + rank].set_xlabel(f"{np.exp(chances[i, g]):.2f}", fontsize=7)


def _draw_place(ax, means, sigma, colour):
    points = means.reshape(-1, 2)
    low, high = points.min(0), points.max(0)
    if np.allclose(np.diff(means[:, 0, 1]), 0):
        frame = Rectangle(low[::-1], *(high - low)[::-1], fill=False, color=colour, lw=0.8)
        ax.add_patch(frame)
    else:
        ax.scatter(points[:, 1], points[:, 0], s=1, color=colour)
    centre = points.mean(0)[::-1]
    ax.add_patch(Ellipse(centre, *2 * sigma[::-1], fill=False, color=colour, lw=0.8))


def draw_history(
    history: dict[int, dict[str, Any]],
    images: np.ndarray,
    coarse: np.ndarray,
    workdir: pathlib.Path,
) -> None:
    """Draws glimpses of canvases by step: three steps as images, and all as `.gif`."""
    steps = sorted(history)
    glimpses = {
        step: Glimpses(**{name: history[step][name] for name in DRAWN if name in history[step]})
        for step in steps
    }
    count = glimpses[steps[0]].patches.shape[1]
    shown = count if glimpses[steps[0]].log_chances is None else min(_BEST, count)
    size = (1.5 * (2 + shown), 1.5 * len(images))
    figure = Figure(figsize=size, dpi=80, layout="constrained")

    def draw(step):
        draw_glimpses(figure, images, coarse, glimpses[step], f"step {step}")

    for step in {steps[0], steps[len(steps) // 2], steps[-1]}:
        draw(step)
        figures.save_png(figure, workdir / f"glimpses-{step}.png")
    figures.save_gif(figure, draw, steps, workdir / "glimpses.gif", frames_per_second=4)
