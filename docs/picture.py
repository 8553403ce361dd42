"""Draws docs/method.png, from what the library computes: `python docs/picture.py`."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, Ellipse

import hyperlayer_jax as hl

OUT, IN = 6, 8
COLOURS = "tab:blue", "tab:orange"


def grid(axes: Axes, title: str) -> None:
    """A matrix of empty cells."""
    axes.set(xlim=(-0.5, IN - 0.5), ylim=(OUT - 0.5, -0.5), aspect="equal", title=title)
    axes.set(xticks=np.arange(IN) - 0.5, yticks=np.arange(OUT) - 0.5)
    axes.tick_params(length=0, labelbottom=False, labelleft=False)
    axes.grid(color="0.85")
    axes.set_axisbelow(True)
    axes.set(xlabel="input", ylabel="output")


def column(axes: Axes, numbers: jax.Array, title: str) -> None:
    """A vector as cells of a column, with its numbers."""
    axes.imshow(numbers[:, None], cmap="RdBu", vmin=-4, vmax=4)
    for i, number in enumerate(numbers):
        axes.text(0, i, f"{np.round(number, 1) + 0:.1f}", ha="center", va="center", fontsize=9)
    axes.set(title=title, xticks=[], yticks=[])


def main() -> None:
    tuples = hl.IndexTuples(
        means=jnp.array([[1.3, 2.4], [3.8, 5.3]]),
        sigmas=jnp.array([[0.8, 0.8], [0.55, 0.55]]),
        values=jnp.array([1.0, -0.8]),
    )
    indices = hl.sample_indices(
        jax.random.key(28), tuples.means, (OUT, IN), num_global=2, num_local=2, region=4
    )
    values = hl.redistribute(indices, tuples)
    x = jnp.round(jax.random.normal(jax.random.key(1), (IN,)), 1)
    y = hl.contract(hl.SparseTensor(indices, values, (OUT,), (IN,)), x)

    figure = Figure(figsize=(11, 3), layout="constrained")
    sampled, spread, inputs, outputs = figure.subplots(1, 4, width_ratios=[IN, IN, 1.6, 1.6])
    grid(sampled, "1. sample integer points around means")
    kinds = np.arange(len(indices)) % (len(indices) // 2)
    for points, marker, label in [
        (indices[kinds < 4], "s", "neighbours"),
        (indices[kinds >= 6], "o", "local"),
        (indices[(kinds >= 4) & (kinds < 6)], "^", "global"),
    ]:
        rows, columns = np.asarray(points).T
        sampled.plot(columns, rows, marker, color="0.45", fillstyle="none", ms=9, label=label)
    for (row, col), (high, wide), colour in zip(tuples.means, tuples.sigmas, COLOURS, strict=True):
        sampled.add_patch(Ellipse((col, row), 2 * wide, 2 * high, color=colour, alpha=0.3))
        sampled.plot(col, row, "+", color=colour, ms=12, mew=2.5)
    sampled.legend(loc="lower left", fontsize=7, framealpha=1)

    grid(spread, "2. redistribute values over them")
    matrix = np.asarray(hl.todense(hl.SparseTensor(indices, values, (OUT,), (IN,))))
    for row, col in np.argwhere(np.abs(matrix) >= 0.005):
        weight = matrix[row, col]
        spread.plot(col, row, "o", color=COLOURS[int(weight < 0)], ms=2 + 24 * abs(weight) ** 0.5)
        spread.text(col, row + 0.46, f"{weight:.2f}", ha="center", va="bottom", fontsize=6)

    column(inputs, np.asarray(x), "x")
    column(outputs, np.asarray(y), "y = W x")
    figure.text(0.905, 0.02, "3. contract", ha="center", fontsize=12)
    for row, col in np.argwhere(np.abs(matrix) >= 0.05):
        figure.add_artist(
            ConnectionPatch(
                (0.5, col), (-0.5, row), "data", "data", axesA=inputs, axesB=outputs,
                color=COLOURS[int(matrix[row, col] < 0)], lw=4 * abs(matrix[row, col]),
            )
        )  # fmt: skip
    figure.savefig(pathlib.Path(__file__).with_name("method.png"), dpi=100)


if __name__ == "__main__":
    main()
