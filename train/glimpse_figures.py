"""Pictures of glimpses: what decides where to look, where that is, and what is read there."""

import functools
import pathlib

import jax
import numpy as np
from flax import nnx
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse, Rectangle

from train import canvases, figures
from train.finding import overview

_NUM_BEST = 3

Arrays = dict[str, np.ndarray]


def look(model: nnx.Module, images: jax.Array) -> Arrays:
    """What is drawn of a model that looks at images; nothing of one without glimpses."""
    _, glimpses = canvases.predict(model, images)
    if glimpses is None:
        return {}
    names = ("patches", "means", "sigmas", "log_chances")
    seen = {name: getattr(glimpses, name) for name in names}
    if hasattr(model, "score"):
        seen["scores"] = model.scores(images)
    return {name: np.asarray(array) for name, array in seen.items() if array is not None}


def draw_glimpses(figure: Figure, images: np.ndarray, coarse: np.ndarray, seen: Arrays) -> None:
    """Draws a row for each image: its glimpses, the overview, scores, and what was read.

    A glimpse has one colour. Its ellipse spans a sigma around the centre. Where glimpses have
    chances, the likeliest are shown, with their chances; all others are white.

    Args:
      figure: is cleared.
      images: [n, H, W, C] in [0, 1].
      coarse: [n, h, w, C], the overviews.
      seen: from `look`.
    """
    figure.clear()
    axes = figure.subplots(len(images), _num_columns(seen), squeeze=False)
    for i, row in enumerate(axes):
        of_row = {name: array[i] for name, array in seen.items()}
        count = len(of_row["patches"])
        chances = of_row.get("log_chances")
        order = range(count) if chances is None else np.argsort(-chances)
        best = list(order)[: _num_shown(seen)]
        pictures = [images[i], coarse[i] / max(coarse[i].max(), 1e-6)]
        if "scores" in seen:
            chance = np.exp(of_row["scores"] - of_row["scores"].max())
            pictures.append(chance[..., None])
        for ax, pixels in zip(row, [*pictures, *of_row["patches"][best]], strict=True):
            ax.imshow(pixels, cmap="gray", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
        for g in reversed(order):
            colour = f"C{best.index(g)}" if g in best else "white"
            _draw_place(row[0], of_row["means"][g], of_row["sigmas"][g], colour)
        for rank, (g, ax) in enumerate(zip(best, row[-len(best) :], strict=True)):
            ax.spines[:].set(color=f"C{rank}", linewidth=2)
            if chances is not None:
                ax.set_xlabel(f"{np.exp(chances[g]):.2f}", fontsize=7, labelpad=2)
    for ax, title in zip(axes[0], ("canvas", "overview", "scores"), strict=False):
        if title != "scores" or "scores" in seen:
            ax.set_title(title, fontsize=8)


def draw_history(
    history: dict[int, Arrays], images: np.ndarray, coarse: np.ndarray, workdir: pathlib.Path
) -> None:
    """Draws glimpses of canvases by step: three steps as images, and all as `.gif`."""
    steps = sorted(history)
    # Scalars, such as errors, are no pictures.
    seen = {step: {k: v for k, v in history[step].items() if np.ndim(v)} for step in steps}
    figure = _figure(seen[steps[0]], images)

    def draw(step):
        draw_glimpses(figure, images, coarse, seen[step])
        figure.suptitle(f"step {step}")

    for step in {steps[0], steps[len(steps) // 2], steps[-1]}:
        draw(step)
        figures.save_png(figure, workdir / f"glimpses-{step}.png")
    figures.save_gif(figure, draw, steps, workdir / "glimpses.gif", frames_per_second=4)


def draw_look(model: nnx.Module, images: jax.Array, path: pathlib.Path) -> None:
    """Draws what a model that scores overviews sees of images."""
    seen = look(model, images)
    images, coarse = map(np.asarray, (images, overview(images, model.coarseness)))
    figure = _figure(seen, images)
    draw_glimpses(figure, images, coarse, seen)
    figures.save_png(figure, path)


def _figure(seen, images):
    size = (1.5 * _num_columns(seen), 1.5 * len(images) + 0.3)
    return Figure(figsize=size, dpi=100, layout="constrained")


def _num_shown(seen):
    count = seen["patches"].shape[1]
    return min(_NUM_BEST, count) if "log_chances" in seen else count


def _num_columns(seen):
    return 2 + ("scores" in seen) + _num_shown(seen)


def _draw_place(ax, means, sigma, colour):
    points = means.reshape(-1, 2)
    low, high = points.min(0), points.max(0)
    rectangular = functools.partial(np.allclose, 0, atol=1e-3)
    if rectangular(np.diff(means[..., 0], axis=1)) and rectangular(np.diff(means[..., 1], axis=0)):
        frame = Rectangle(low[::-1], *(high - low)[::-1], fill=False, color=colour, lw=0.8)
        ax.add_patch(frame)
    else:
        ax.scatter(points[:, 1], points[:, 0], s=1, color=colour)
    ellipse = Ellipse(points.mean(0)[::-1], *2 * sigma[::-1], fill=False, color=colour, lw=0.8)
    ax.add_patch(ellipse)
