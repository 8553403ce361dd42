"""The transformer launcher: a step of every kind of layer, its files, and that it does learn."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("tensorboardX", reason="launchers need the extra train")

from train import language, offset, patterns, recall, transformer, transformer_config
from train.runs import load_run

SMALL = {
    "steps": 2, "features": 8, "num_heads": 2, "length": 16, "batch_size": 2, "num_tuples": 1,
    "num_global": 1, "num_local": 1, "window": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("to be or not to be, that is the question. " * 400)
    return str(path)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            {"layers": "w2tb", "dropout": 0.1, "bfloat16": True, "stride": 4, "block": 4},
            marks=pytest.mark.slow,
        ),
        {
            "layers": "wl",
            "positions": "learned",
            "steps": 150,
            "learning_rate": 0.02,
            "length": 32,
        },
    ],
    ids=str,
)
def test_trains_evaluates_and_leaves_its_files(tmp_path, corpus, options):
    config = transformer.Config(**(SMALL | options), corpus=corpus)
    # Layers of flax promote bfloat16 themselves.
    with jax.numpy_dtype_promotion("standard"):
        result = transformer.train_and_evaluate(config, tmp_path)
    assert {"loss", "compile_seconds", "train_seconds", "unigram", "bigram"} <= set(result)
    assert result["steps"] == config.steps and result["test_examples"] > 10
    assert 0 < result["bits_per_byte"] < (12 if config.steps == 2 else result["unigram"] - 1)
    for name in ("attention-0.png", f"attention-{config.steps}.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "--- continued:" in (tmp_path / "continued.txt").read_text()
    assert load_run(tmp_path)[1] == config
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite([line["loss"] for line in lines if "loss" in line]).all()


@pytest.mark.slow
def test_finds_an_offset_that_it_is_not_told(tmp_path):
    options = {"offset": 6, "length": 16, "num_global": 4, "steps": 800, "mesh": "data:1"}
    config = transformer.Config(task="offset", **options)
    result = transformer.train_and_evaluate(config, tmp_path)
    assert result["solved_at"] < 800 and result["steady"] == 1
    assert result["loss"] < 0.001
    assert {"steps", "test_examples"} <= set(result)
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("losses", "solved"),
    [
        ([4.0, 0.1, 0.002], (None, None)),
        ([4.0, 0.1, 0.0009], (100, None)),
        ([4.0, 0.0009, 0.0008], (50, 1.0)),
        ([4.0, 0.0009, 0.1, 0.0008, 0.0007], (50, 2 / 3)),
    ],
)
def test_solved_is_the_first_low_loss(losses, solved):
    assert offset.when_solved(dict(zip(range(0, 250, 50), losses, strict=False))) == solved


@pytest.mark.parametrize(
    ("options", "extent"),
    [
        ({"layers": "b", "block": 8}, (0, 24, 24, 0)),
        ({"layers": "t", "stride": 4}, (0, 22, 20, 0)),
        ({"layers": "s"}, (0, 22, 22, 0)),
    ],
)
def test_pictures_are_in_units_of_tokens(options, extent):
    """Blocks are of 8 tokens and go beyond the end; of rows there is one in every 4 tokens."""
    config = transformer.Config(**options, length=32, features=8, num_heads=2)
    model = transformer_config.make_model(config)
    first, second = patterns.draw_patterns(model, np.zeros(22, np.int32)).axes
    for axes in (first, second):
        assert tuple(axes.images[0].get_extent()) == extent
        assert axes.get_xlim() == (0, 22) and axes.get_ylim() == (22, 0)


def test_pictures_show_the_largest_weight_of_each_square():
    weights = np.zeros((600, 600), np.float32)
    weights[599, 0] = 1
    shown, sizes = patterns.squares(weights)
    assert shown.shape == (200, 200) and sizes == [3, 3]
    assert shown[199, 0] == 1 and shown.sum() == 1


def test_an_answer_is_what_stood_next_to_its_key():
    tokens, answers = map(np.asarray, recall.examples(jax.random.key(0), 3, length=20, pairs=6))
    assert (answers[:, :12] == -1).all()
    for told, asked, wanted in zip(tokens[:, :12], tokens[:, 12:], answers[:, 12:], strict=True):
        values = dict(told.reshape(6, 2).tolist())
        assert len(values) == 6
        assert wanted.tolist() == [values[key] for key in asked.tolist()]


def test_recall_is_measured_on_new_examples(tmp_path):
    sizes = {"length": 12, "pairs": 3, "features": 8, "num_heads": 1, "layers": "c", "steps": 2}
    config = transformer.Config(task="recall", mesh="data:1", **sizes)
    figures = transformer.train_and_evaluate(config, tmp_path)
    assert 0 <= figures["accuracy"] < 0.1 and figures["steps"] == 2


def test_the_step_size_warms_up_and_long_gradients_are_clipped():
    config = transformer.Config(layers="s", length=16, warmup=4, steps=40, learning_rate=0.5)
    params = nnx.state(transformer_config.make_model(config), nnx.Param)
    params = jax.tree.map(jnp.zeros_like, params)
    optimizer = language.make_optimizer(config)
    update = jax.jit(optimizer.update)

    def steps(scales):
        state = optimizer.init(params)
        for scale in scales:
            gradient = jax.tree.map(lambda x, scale=scale: jnp.full_like(x, scale), params)
            updates, state = update(gradient, state, params)
            yield float(jnp.abs(jax.tree.leaves(updates)[0]).max())

    with jax.numpy_dtype_promotion("standard"):
        # Adam's step for a gradient that stays is as long as its step size.
        np.testing.assert_allclose(
            list(steps([1.0] * 5)), [0, 0.125, 0.25, 0.375, 0.5], rtol=0.01, atol=1e-6
        )
        np.testing.assert_allclose(
            list(steps([1.0, 1.0, 1e3, 1e3, 1.0])), list(steps([1.0] * 5)), rtol=1e-4, atol=1e-6
        )


def test_steps_of_positions_are_kept_short_on_the_offset_task():
    options = {"length": 64, "learning_rate": 1.0, "warmup": 0, "steps": 10}
    config = transformer.Config(task="offset", offset=9, **options)
    model = transformer_config.make_model(config)
    params = nnx.state(model, nnx.Param)
    optimizer = offset.make_optimizer(config, model)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    steps = updates["blocks"][0]["attention"]["positions"]["parameters"][...]
    # The first step of Adam is as long as its step size.
    assert np.abs(steps[..., 0]).min() < 0.9


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"layers": "wx"}, "--layers"),
        ({"dropout": 1.0}, "--dropout"),
        ({"learning_rate": 0.0}, "--learning_rate"),
        ({"num_heads": 3}, "--num_heads"),
        ({"length": 1}, "--length"),
        ({"length": 16, "num_tuples": 17}, "--num_tuples must be at most --length=16, got 17"),
        ({"offset": 9}, "--offset has no effect with --task=text"),
        ({"layers": "ls", "window": 9}, "--window has no effect with --layers=ls"),
        ({"layers": "wd", "num_global": 9}, "--num_global has no effect with --layers=wd"),
        ({"layers": "wl", "block": 9, "stride": 9}, "--stride .*; --block has no effect"),
        (
            {"task": "offset", "corpus": "a", "temperature": 1.0},
            "--corpus .*; --temperature has no",
        ),
        ({"task": "offset", "offset": 9, "length": 9}, "--offset"),
    ],
)
def test_a_wrong_value_names_its_flag(options, flag):
    with pytest.raises(ValueError, match=flag):
        transformer.Config(**options)


def test_defaults_go_by_the_task():
    config = transformer.Config()
    assert (config.length, config.features, config.learning_rate) == (256, 128, 3e-3)
    config = transformer.Config(task="offset", offset=200)
    assert (config.layers, config.length, config.num_tuples) == ("s", 256, 2)
    assert (config.features, config.learning_rate) == (32, 1e-2)
    assert transformer.Config(task="offset", num_tuples=3).num_tuples == 3
