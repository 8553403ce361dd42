import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hyperlayer_jax import nn

pytest.importorskip("tensorboardX", reason="launchers need the extra train")

from train import finding, searches


def test_all_places_are_alike_to_a_map_of_scores():
    model = finding.ScoreMap(1, 4, 1, nnx.Rngs(0))
    score = nnx.jit(lambda model, cells: model(finding.survey(cells, 1)))
    cells = jnp.zeros((1, 9, 8, 1)).at[:, 2:5, 2:4].set(jax.random.uniform(jax.random.key(0)))
    moved = score(model, jnp.roll(cells, (3, 2), (1, 2)))
    np.testing.assert_allclose(moved[:, 3:, 2:], score(model, cells)[:, :-3, :-2], atol=1e-5)


def test_chosen_cells_have_the_scores_that_they_have_among_all():
    model = finding.ScoreMap(2, 4, 2, nnx.Rngs(0))
    cells = jax.random.uniform(jax.random.key(0), (2, 5, 4, 2))
    survey = finding.survey(cells, 1, 7)
    whole = finding.survey(cells, 1)
    every = np.asarray(model(whole))
    chosen = np.asarray(survey.chosen)
    want = np.stack([m[tuple(c.T)] for m, c in zip(every, chosen, strict=True)])
    np.testing.assert_allclose(model(survey), want, rtol=1e-4, atol=1e-5)
    contrast = np.sort(np.asarray(whole.contrast).reshape(2, -1))[:, :-8:-1]
    np.testing.assert_allclose(survey.contrast, contrast)


def test_contrast_is_where_the_image_is_busy():
    cells = jnp.full((1, 9, 8, 1), 0.5).at[0, 3, 5].set(1.0)
    contrast = np.asarray(finding.survey(cells, 1).contrast)[0]
    assert (contrast[2:5, 4:7] > contrast[0, 0] + 1).all()
    np.testing.assert_allclose(contrast[6:], contrast[0, 0], atol=1e-5)


def test_draws_of_attention_sampling_have_the_mean_and_the_gradient_of_all_cells():
    images = jax.random.uniform(jax.random.key(0), (1, 6, 4, 1))
    maps = jax.random.normal(jax.random.key(1), (1, 3, 2, 4))
    search = searches.AttentionSampling((1, 1), 3, num_anywhere=0, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(search)
    middles = images.reshape(1, 3, 2, 2, 2).mean((2, 4)).ravel()

    def drawn(maps):
        model = nnx.merge(graphdef, state, copy=True)
        many = jnp.tile(maps, (20000, 1, 1, 1)).at[..., 1:].set(jnp.zeros(3))
        seen = model(jnp.tile(images, (20000, 1, 1, 1)), many)
        return nn.average(seen, seen.patches.reshape(20000, 3, 1)).mean()

    def exact(maps):
        return (jax.nn.softmax(maps[..., 0].ravel()) * middles).sum()

    got, want = (jax.jit(jax.value_and_grad(f))(maps) for f in (drawn, exact))
    np.testing.assert_allclose(got[0], want[0], atol=0.01)
    np.testing.assert_allclose(got[1][..., 0], want[1][..., 0], atol=0.01)


def test_the_mean_of_a_sure_map_is_its_cell():
    images = jax.random.uniform(jax.random.key(0), (1, 15, 20, 2))
    maps = jnp.zeros((1, 3, 4, 4)).at[:, 1, 2, 0].set(100.0)
    seen = searches.SoftArgmax(5)(images, maps)
    np.testing.assert_allclose(seen.patches[0, 0], images[0, 5:10, 10:15], atol=1e-5)
