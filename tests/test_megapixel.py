import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("tensorboardX", reason="launchers need the extra train")

from train import data, finding, glimpse, megapixel
from train.config import FlagError

# Ten images of one colour each, so that every pixel of a canvas tells where it is from.
COLOURS = np.arange(1, 11, dtype=np.float32) / 51
DIGITS = data.Split(
    np.ones((10, 6, 6, 1), np.float32) * COLOURS[:, None, None, None],
    np.arange(10, dtype=np.int32) % 5,
)
SMALL = {
    "task": "megapixel", "digit_size": 6, "canvas": 40, "coarseness": 2, "scored": 60,
    "candidates": 6, "window": 8, "score_hidden": 4, "reach": 1, "hidden": 8, "batch_size": 4,
    "steps": 1,
}  # fmt: skip


def whole(images):
    return np.asarray(jax.device_put(images).whole())


def scenes(**flags):
    # Labels of 0 to 4 alone are drawn of these digits.
    config = glimpse.Config(**SMALL | flags)
    return megapixel.make_scenes(3, DIGITS, 20, config)


@pytest.fixture(autouse=True)
def few_classes(monkeypatch):
    monkeypatch.setattr(megapixel.canvases, "NUM_CLASSES", 5)


def test_three_of_five_whole_digits_are_of_the_class_and_two_are_not():
    made = scenes(num_patches=0)
    for canvas, label in zip(whole(made.images), made.labels, strict=True):
        values, counts = np.unique(
            np.round(canvas[canvas > 0] * 51).astype(int), return_counts=True
        )
        assert counts.sum() == 5 * 36 and (counts % 36 == 0).all()
        digits = np.repeat(DIGITS.labels[values - 1], counts // 36)
        assert (digits == label).sum() == 3


def test_scribbles_lie_over_digits_and_reach_1():
    patterns = megapixel.scribbles(np.random.default_rng(0), 28)
    assert (
        patterns.shape == (50, 28, 28) and 0.8 < patterns[patterns > 0].min() < patterns.max() <= 1
    )
    assert (patterns > 0).mean() < 0.1
    canvases = whole(scenes(num_patches=40).images)
    plain = (np.abs(canvases[..., None] - COLOURS) < 1e-3).any(-1)
    assert plain.sum() < 20 * 5 * 36 and canvases.max() > 0.8


def test_what_is_known_of_a_canvas_is_what_a_survey_of_all_of_it_says():
    made = jax.device_put(scenes(num_patches=3))
    images, known = made.pick(np.array([4, 2]))
    want = finding.survey(jnp.asarray(whole(images)), 2, 60)
    np.testing.assert_allclose(whole(known.overview), want.overview, atol=1e-3)
    np.testing.assert_allclose(known.contrast, want.contrast, atol=0.01)
    model = finding.ScoreMap(1, 4, 1, finding.nnx.Rngs(0))
    contrast = jnp.take_along_axis(
        finding.survey(jnp.asarray(whole(images)), 2).contrast.reshape(2, -1),
        known.chosen @ np.array([20, 1]), 1,
    )  # fmt: skip
    np.testing.assert_allclose(
        model(known), model(want._replace(chosen=known.chosen, contrast=contrast)), atol=0.02
    )


def test_flags_of_a_megapixel():
    with pytest.raises(ValueError, match="--canvas must be at least 140 for digits"):
        glimpse.Config(task="megapixel", canvas=120)
    with pytest.raises(ValueError, match="--scored must be below the 324 cells, got 384"):
        glimpse.Config(task="megapixel", canvas=180)
    with pytest.raises(ValueError, match="--task=megapixel wants --scored"):
        glimpse.Config(task="megapixel", model="stn")
    with pytest.raises(ValueError, match="--rotation has no effect with --task=megapixel"):
        glimpse.Config(task="megapixel", rotation=3.0)


@pytest.mark.slow
def test_a_megapixel_begins_with_a_model_of_small_canvases(monkeypatch, tmp_path):
    monkeypatch.setattr(glimpse, "NUM_VALIDATION", 1)
    monkeypatch.setattr(megapixel, "NUM_HELD_OUT", 20)
    monkeypatch.setattr(megapixel.canvases, "NUM_CLASSES", 10)
    small = SMALL | {"task": "digit", "canvas": 20, "patch_size": 3, "candidates": 3, "scored": 0}
    glimpse.train_and_evaluate(glimpse.Config(**small), tmp_path / "small")
    config = glimpse.Config(**SMALL, train_canvases=30, start=str(tmp_path / "small"))
    figures = glimpse.train_and_evaluate(config, tmp_path / "large")
    assert figures["test_examples"] == 20 and 0 <= figures["error"] <= 1
    rows = [json.loads(x) for x in (tmp_path / "large" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "validation_error" in row] == [0, 1]
    with pytest.raises(FlagError, match=r"--start: dense of .* has another shape"):
        glimpse.train_and_evaluate(
            glimpse.Config(**SMALL | {"window": 9}, train_canvases=30, start=config.start),
            tmp_path / "other",
        )
