"""What is asked of models that recall, and models that are trained side by side."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from laws import assert_close

pytest.importorskip("tensorboardX", reason="benchmarks need the extra train")

from benchmarks import recall, seeds


def test_zoology_asks_for_every_key_once_and_answers_with_its_value():
    draw = jax.jit(recall.zoology, static_argnames=("count", "length", "pairs", "total"))
    drawn = draw(jax.random.key(0), count=5, length=40, pairs=8, total=48)
    tokens, answers = map(np.asarray, drawn)
    assert tokens.shape == answers.shape == (5, 48) and not tokens[:, 40:].any()
    for token, answer in zip(tokens, answers, strict=True):
        values = dict(token[:16].reshape(8, 2).tolist())
        asked = np.flatnonzero(answer >= 0)
        assert asked.min() >= 16 and len(values) == len(asked) == 8
        assert set(token[asked]) == set(values)
        assert answer[asked].tolist() == [values[key] for key in token[asked]]


def test_the_needle_is_the_value_after_what_is_asked_for():
    tokens, answers = map(np.asarray, recall.needle(jax.random.key(0), 6, length=9))
    assert (answers[:, :-1] == -1).all() and (tokens[:, -1] == 0).all()
    for token, answer in zip(tokens, answers[:, -1], strict=True):
        (place,) = np.flatnonzero(token[:-1] == 0)
        assert token[place + 1] == answer >= 256


def test_seeds_side_by_side_are_trained_as_each_alone():
    def loss_fn(model, key, data):
        return ((model(data) - jax.random.normal(key, (4, 2))) ** 2).mean(), {}

    def train(first, count):
        models = [nnx.Linear(3, 2, rngs=nnx.Rngs(first + i)) for i in range(count)]
        options = {"seed": first, "steps": 5, "every": 2}
        return list(seeds.train(models, optax.adam(0.1), loss_fn, jnp.ones((4, 3)), **options))

    done, second = train(0, 2), train(1, 1)
    assert [x.step for x in done] == [2, 4, 5]
    for both, alone in zip(done, second, strict=True):
        assert_close(both.states[1], alone.states[0])
        np.testing.assert_allclose(both.scalars[1]["loss"], alone.scalars[0]["loss"], rtol=1e-5)
