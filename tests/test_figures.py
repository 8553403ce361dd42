import pytest

pytest.importorskip("matplotlib", reason="pictures need the extra train")

from matplotlib.figure import Figure
from PIL import Image

from train import figures


def test_png_and_gif_are_whole(tmp_path):
    figure = Figure(figsize=(2, 1), dpi=50)
    (line,) = figure.subplots().plot([0, 1], [0, 1])
    figures.save_png(figure, tmp_path / "line.png")
    heights = [1, 2, 3]
    figures.save_gif(
        figure, lambda height: line.set_ydata([0, height]), heights, tmp_path / "line.gif"
    )
    assert Image.open(tmp_path / "line.png").size == (100, 50)
    assert Image.open(tmp_path / "line.gif").n_frames == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["line.gif", "line.png"]
