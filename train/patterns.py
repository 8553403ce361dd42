"""Pictures of where the layers of a transformer look."""

import math
import pathlib

import jax
import numpy as np
from matplotlib.figure import Figure

from hyperlayer_jax import todense
from hyperlayer_jax.nn import TransformerLM
from train import evaluation, figures

# Pictures show the first of the tokens.
_TOKENS_DRAWN = 2048
# Of weights that are more, the largest in a square is shown.
_PIXELS = 256


def save_patterns(model: TransformerLM, tokens: np.ndarray, path: pathlib.Path) -> None:
    """Writes the picture of tokens int32 [T], if there is one."""
    picture = draw_patterns(model, tokens[:_TOKENS_DRAWN])
    if picture is not None:
        figures.save_png(picture, path)


@evaluation.compiled
def _weights(model, tokens):
    """Of each layer the weights [heads, rows, columns] of its pattern for tokens [T], or None."""
    patterns = evaluation.deterministic(model).patterns(tokens[None])
    dense = [None if pattern is None else todense(pattern) for pattern in patterns]
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[-2:]), dense)


def draw_patterns(model: TransformerLM, tokens: np.ndarray) -> Figure | None:
    """Where the heads of each layer look in tokens int32 [T], in evaluation.

    Layers without a pattern are left out; None if there is no other.
    """
    length, pictures = len(tokens), []
    for index, heads in enumerate(_weights(model, tokens)):
        kind = model.blocks[index].attention.kind
        name = type(kind).__name__.lower()
        for head, fine in enumerate([] if heads is None else np.asarray(heads)):
            weights, pixels = squares(fine)
            # An entry is of a block of tokens, or a row of every so many.
            height, width = (a * b for a, b in zip(kind.spacing, pixels, strict=True))
            extent = (0, width * weights.shape[1], height * weights.shape[0], 0)
            pictures.append((f"layer {index} ({name}), head {head}", weights, extent))
    if not pictures:
        return None
    columns = min(len(pictures), 4)
    rows = math.ceil(len(pictures) / columns)
    figure = Figure(figsize=(3.2 * columns, 3.4 * rows), dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (title, weights, extent) in zip(axes, pictures, strict=False):
        axis.imshow(weights, cmap="Blues", vmin=0, vmax=1, extent=extent, interpolation="nearest")
        axis.plot([0, length], [0, length], color="lightgray", linewidth=0.5)
        axis.set(title=title, xlabel="looks at", ylabel="token")
        axis.set(xlim=(0, length), ylim=(length, 0))
    for axis in axes[len(pictures) :]:
        axis.set_axis_off()
    return figure


def squares(weights):
    """Weights [rows, columns] as the largest in squares, few enough to see, and their sizes."""
    sizes = [math.ceil(size / _PIXELS) for size in weights.shape]
    padding = [(0, -size % square) for size, square in zip(weights.shape, sizes, strict=True)]
    padded = np.pad(weights, padding)
    shape = (padded.shape[0] // sizes[0], sizes[0], padded.shape[1] // sizes[1], sizes[1])
    return padded.reshape(shape).max((1, 3)), sizes
