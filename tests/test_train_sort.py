"""The sorting launcher: what it draws, what it loses, and a few steps of every kind."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hyperlayer_jax import soft_quicksort

pytest.importorskip("tensorboardX", reason="launchers need the extra train")

from train import augment, data, sort
from train.runs import load_run

SMALL = {"steps": 3, "width": 8, "batch_size": 2}


@pytest.fixture(scope="module")
def digits():
    return data.load("digits").test


@pytest.mark.parametrize(
    "options",
    [
        {"size": 1, "test_sizes": "2"},
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                {"size": 3, "digits": 2, "loss": "plain", "proposal": "uniform"},
                {"size": 4, "loss": "separate", "augment": False},
            )
        ),
    ],
    ids=str,
)
def test_trains_evaluates_and_leaves_its_files(tmp_path, options):
    config = sort.Config(**SMALL, **options)
    result = sort.train_and_evaluate(config, tmp_path)
    assert {"exact_match", "element_wise", "train_seconds", "compile_seconds"} <= set(result)
    assert result["steps"] == 3 and result["test_examples"] == 10_000
    assert 0 <= result["exact_match"] <= result["element_wise"] <= 1
    assert result["exact_match"] == 1 or options["size"] > 1
    assert ("exact_match_2" in result) == ("test_sizes" in options)
    assert (tmp_path / "sorted.png").read_bytes().startswith(b"\x89PNG")
    assert load_run(tmp_path)[1] == config
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite([line["loss"] for line in lines if "loss" in line]).all()


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"size": 0}, "--size"),
        ({"digits": 10}, "--digits"),
        ({"certainty": 0.0}, "--certainty"),
        ({"dropout": 1.0}, "--dropout"),
        ({"test_sizes": "5,x"}, "--test_sizes"),
        ({"learning_rate": -1.0}, "--learning_rate"),
    ],
)
def test_a_wrong_value_names_its_flag(options, flag):
    with pytest.raises(ValueError, match=flag):
        sort.Config(**options)


def test_too_few_images_for_a_set_is_a_data_error(digits):
    with pytest.raises(data.DataError, match=r"--size=400 .* has only 359"):
        sort.fixed_sets(digits, sort.Config(size=400), 1)


def test_a_set_holds_no_image_twice(digits):
    chosen = sort.fixed_sets(digits, sort.Config(size=100, digits=2), 5).reshape(5, -1)
    assert all(len(set(row)) == 200 for row in chosen.tolist())


def test_digits_read_as_decimal_numbers():
    labels = np.array([[[0, 7], [4, 2]], [[9, 9], [1, 0]]], np.int32)
    assert sort.to_numbers(labels).tolist() == [[7, 42], [99, 10]]


def test_accuracy_counts_equal_numbers_in_any_order(digits):
    config = sort.Config(size=6, width=8)
    model = sort.Sorter(config, 64, rngs=nnx.Rngs(0))
    chosen = sort.fixed_sets(digits, config, 50)
    by_label = digits.labels[chosen][..., 0]
    figures = sort.evaluate(model, digits, chosen)
    scores = nnx.view(model.scorer, deterministic=True)(digits.images.reshape(-1, 1, 64))
    order = np.argsort(np.asarray(scores)[chosen[..., 0]], -1, kind="stable")
    exact = [
        all(row[a] <= row[b] for a, b in itertools.pairwise(o))
        for row, o in zip(by_label.tolist(), order.tolist(), strict=True)
    ]
    assert figures["exact_match"] == pytest.approx(np.mean(exact))


@pytest.mark.parametrize("kind", ["plain", "means", "separate"])
@pytest.mark.parametrize("size", [1, 5])
def test_an_exact_sort_has_no_loss_and_a_wrong_one_has(kind, size):
    key = jax.random.key(size)
    x = jax.random.normal(key, (3, size, 4))
    scores = x[..., 0]
    exact = jax.jit(functools.partial(soft_quicksort, num_samples=0, certainty=1.0))
    result = exact(key, x, scores)
    target = jnp.take_along_axis(x, jnp.argsort(scores, -1)[..., None], -2)
    loss = jax.jit(functools.partial(sort.sort_loss, kind=kind))
    assert loss(result, target) < 1e-10
    if size > 1:
        assert loss(result, target[:, ::-1]) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "means", "separate"])
def test_every_loss_reaches_the_scores(kind):
    key = jax.random.key(0)
    x = jax.random.normal(key, (2, 8, 4))
    target = jnp.sort(x, axis=1)

    def loss(scores):
        result = soft_quicksort(key, x, scores, num_samples=10, certainty=1.0)
        return sort.sort_loss(result, target, kind)

    gradient = jax.jit(jax.grad(loss))(jax.random.normal(key, (2, 8)))
    assert jnp.isfinite(gradient).all() and (gradient != 0).all()


def test_no_distortion_changes_nothing(digits):
    images = jnp.asarray(digits.images[:3])
    still = augment.distort(jax.random.key(0), images, shift=0.0, rotation=0.0, scale=0.0)
    np.testing.assert_allclose(still, images, atol=1e-6)


def test_a_distortion_keeps_the_range_and_most_of_the_ink(digits):
    images = jnp.asarray(digits.images)
    moved = augment.distort(jax.random.key(0), images, shift=1.0, rotation=0.15, scale=0.1)
    assert moved.shape == images.shape
    assert float(moved.min()) >= 0 and float(moved.max()) <= 1 + 1e-5
    assert float(moved.sum() / images.sum()) == pytest.approx(1, abs=0.1)
    assert float(jnp.abs(moved - images).mean()) > 0.05
