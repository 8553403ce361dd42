import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import call
from scipy import ndimage

from hyperlayer_jax import nn

pytest.importorskip("tensorboardX", reason="launchers need the extra train")

from PIL import Image

from train import glimpse


def test_spatial_transformer_reads_its_means_as_scipy_does():
    images = jax.random.normal(jax.random.key(0), (3, 10, 8, 2))
    features = 30 * jax.random.normal(jax.random.key(1), (3, 6))
    seen = call(nn.SpatialTransformer(6, (4, 5), 2, rngs=nnx.Rngs(0)), images, features)
    assert seen.patches.shape == (3, 2, 4, 5, 2) and not seen.sigmas.any()
    for b, g, c in np.ndindex(3, 2, 2):
        points = np.moveaxis(np.asarray(seen.means[b, g]), -1, 0)
        want = ndimage.map_coordinates(np.asarray(images[b, ..., c]), points, order=1)
        np.testing.assert_allclose(seen.patches[b, g, ..., c], want, atol=1e-4)


def attend(shape="box", points=(), **arguments):
    points = dict(points)
    rngs = nnx.Rngs(0)
    sampler = nn.Sampler(**{"num_local": 4, "num_global": 1, "region": 5, "rngs": rngs} | points)
    return nn.GlimpseAttention(6, (4, 5), 2, shape=shape, sampler=sampler, rngs=rngs, **arguments)


@pytest.mark.parametrize("shape", ["box", "quad", "affine"])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_glimpses_have_their_shapes_and_start_on_the_image(shape, batch):
    images = jax.random.uniform(jax.random.key(0), (*batch, 16, 12, 3))
    features = jax.random.normal(jax.random.key(1), (*batch, 6))
    seen = call(attend(shape), images, features)
    assert seen.patches.shape == (*batch, 2, 4, 5, 3)
    assert seen.means.shape == (*batch, 2, 4, 5, 2) and seen.sigmas.shape == (*batch, 2, 2)
    assert seen.log_prob is None and seen.baseline is None
    assert seen.patches.min() >= 0 and seen.patches.max() <= 1 + 1e-5
    means = np.asarray(seen.means)
    extent = (means.max((-2, -3)) - means.min((-2, -3))) / np.array([15, 11])
    sizes = np.broadcast_to([[0.75, 0.75], [0.375, 0.375]], extent.shape)
    assert (extent > 0.4 / 0.75 * sizes).all() and extent.max() <= 1
    centred = np.asarray(call(attend(shape), images, jnp.zeros_like(features)).means)
    extent = (centred.max((-2, -3)) - centred.min((-2, -3))) / np.array([15, 11])
    np.testing.assert_allclose(extent, sizes, rtol=1e-5)


@pytest.mark.parametrize("shape", ["box", "quad", "affine"])
def test_gradients_reach_every_parameter_at_the_start(shape):
    images = jax.random.uniform(jax.random.key(0), (3, 16, 12, 1))
    features = jax.random.normal(jax.random.key(1), (3, 6))

    def loss(model, features):
        return (model(images, features).patches ** 2).sum()

    gradients = nnx.jit(nnx.grad(loss, argnums=(0, 1)))(attend(shape), features)
    for gradient in jax.tree.leaves(gradients):
        assert np.isfinite(gradient).all() and np.abs(gradient).sum() > 0


def test_channels_share_their_points_and_constants_are_kept():
    images = jnp.tile(jax.random.uniform(jax.random.key(0), (2, 16, 12, 1)), (1, 1, 1, 3))
    features = jax.random.normal(jax.random.key(1), (2, 6))
    patches = call(attend(), images, features).patches
    np.testing.assert_array_equal(patches[..., :1], patches[..., 1:2])
    patches = call(attend(), jnp.ones_like(images), features).patches
    np.testing.assert_allclose(patches, 1, rtol=1e-5)


def test_glimpses_without_points_are_means_of_four_neighbours():
    images = jax.random.uniform(jax.random.key(0), (2, 16, 12, 1))
    features = 5 * jax.random.normal(jax.random.key(1), (2, 6))
    model = nnx.view(attend(points={"num_global": 0, "num_local": 0}), deterministic=True)
    images, seen = jax.device_get((images, call(model, images, features)))
    for b, g, i, j in np.ndindex(2, 2, 4, 5):
        points = oracle.neighbours(seen.means[b, g, i, j])
        shares = oracle.redistribute(points, [seen.means[b, g, i, j]], [seen.sigmas[b, g]], [1.0])
        want = sum(s * images[b, *p] for s, p in zip(shares, points, strict=True))
        np.testing.assert_allclose(seen.patches[b, g, i, j], want, atol=1e-5)


@pytest.mark.filterwarnings("error::UserWarning")
def test_images_of_numpy_are_what_jax_makes_of_them():
    images, features = np.random.default_rng(0).random((2, 16, 12, 1)), np.ones((2, 6))
    model = nnx.view(attend(), deterministic=True)
    want = call(model, jnp.asarray(images), jnp.asarray(features)).patches
    np.testing.assert_allclose(model(images, features).patches, want, atol=1e-6)


def test_deterministic_glimpses_draw_nothing():
    images = jax.random.uniform(jax.random.key(0), (2, 16, 12, 1))
    features = 5 * jax.random.normal(jax.random.key(1), (2, 6))
    drawn = attend()
    fixed = nnx.view(drawn, deterministic=True)
    first, second, *others = (
        call(m, images, features).patches for m in (fixed, fixed, drawn, drawn)
    )
    np.testing.assert_array_equal(first, second)
    assert all((np.asarray(other) != np.asarray(first)).any() for other in others)


def test_half_precision_images_keep_their_dtype_and_exact_means():
    images = jnp.ones((2, 16, 12, 1), jnp.bfloat16)
    seen = call(attend(), images, jnp.ones((2, 6), jnp.bfloat16))
    assert seen.patches.dtype == jnp.bfloat16 and seen.means.dtype == jnp.float32


@functools.partial(jax.jit, static_argnums=0)
def descend(shape, pixel, key):
    """Descends on minus the light in a glimpse of one pixel: its place [steps, 2], in indices."""
    images = jnp.zeros((32, 16, 16, 1)).at[:, pixel[0], pixel[1]].set(1.0)
    rngs = nnx.Rngs(params=0, sample=key)
    sampler = nn.Sampler(num_global=8, num_local=8, region=8, rngs=rngs)
    model = nn.GlimpseAttention(
        1, (1, 1), 1, shape=shape, sigma_scale=0.2, sampler=sampler, rngs=rngs
    )
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def step(carry, _):
        params, rest = carry

        def loss(params):
            model = nnx.merge(graphdef, params, rest, copy=True)
            seen = model(images, jnp.ones((32, 1)))
            drawn = nnx.state(model, nnx.Not(nnx.Param))
            return -seen.patches.mean(), (seen.means.mean((0, 1, 2, 3)), drawn)

        (gradients, (centre, rest)) = jax.grad(loss, has_aux=True)(params)
        norm = optax.tree.norm(gradients) + 1e-12
        params = jax.tree.map(lambda p, g: p - 0.03 * g / norm, params, gradients)
        return (params, rest), centre

    return jax.lax.scan(step, (params, rest), length=120)[1]


@settings(max_examples=15, deadline=None)
@given(
    shape=st.sampled_from(["box", "quad", "affine"]),
    pixel=st.tuples(st.integers(2, 13), st.integers(2, 13)),
    seed=st.integers(0, 1000),
)
def test_a_glimpse_moves_towards_the_only_light(shape, pixel, seed):
    centres = np.asarray(descend(shape, np.array(pixel, np.int32), jax.random.key(seed)))
    start, end = (np.linalg.norm(c - np.array(pixel)) for c in (centres[0], centres[-10:].mean(0)))
    assert end < 0.3 * start + 0.5


def test_the_policy_of_reinforce_learns_where_the_reward_is():
    model = nn.ReinforceGlimpses(1, (3, 3), 1, rngs=nnx.Rngs(0))
    images, features = jnp.zeros((64, 17, 17, 1)), jnp.ones((64, 1))

    @nnx.jit
    def step(model):
        def loss(model):
            seen = model(images, features)
            centres = seen.means.mean((1, 2, 3))
            distance = ((centres - jnp.array([[12.0, 4.0]])) ** 2).sum(-1)
            return nn.reinforce_loss(seen, -distance / 10), distance.mean()

        gradients, distance = nnx.grad(loss, has_aux=True)(model)
        params = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.02 * g, params, gradients))
        return distance

    distances = [float(step(model)) for _ in range(200)]
    assert np.mean(distances[-10:]) < 0.3 * distances[0]
    seen = call(nnx.view(model, deterministic=True), images, features)
    assert seen.log_prob is None and seen.patches.shape == (64, 1, 3, 3, 1)


def reinforce(num_glimpses=2, **arguments):
    return nn.ReinforceGlimpses(6, (4, 5), num_glimpses, rngs=nnx.Rngs(0), **arguments)


def reinforced(reward):
    seen = reinforce()(jnp.ones((2, 8, 8, 1)), jnp.ones((2, 6)))
    return nn.reinforce_loss(seen, reward)


def unlikely():
    return reinforce(deterministic=True)(jnp.ones((2, 8, 8, 1)), jnp.ones((2, 6)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attend("circle"), "shape: got 'circle'"),
        (lambda: attend(sigma_scale=0.0), "sigma_scale: got 0.0"),
        (lambda: attend(initial_size=1.0), "initial_size: got 1.0"),
        (lambda: nn.SpatialTransformer(6, (4, 5), 0, rngs=nnx.Rngs(0)), "num_glimpses: got 0"),
        (lambda: reinforce(num_glimpses=0), "num_glimpses: got 0"),
        (lambda: reinforce(policy_sigma=0.0), "policy_sigma: got 0.0"),
        (lambda: nn.reinforce_loss(unlikely(), jnp.ones(2)), "glimpses: got those of a determ"),
        (lambda: attend()(jnp.ones((2, 8, 8, 1)), jnp.ones((3, 6))), "features: got shape"),
        (lambda: attend()(jnp.ones((2, 8, 8, 1)), jnp.ones((2, 5))), r"want \[\*B, 6\]"),
        (lambda: reinforced(jnp.ones((2, 1))), r"reward: got shape \(2, 1\)"),
        (lambda: attend()(jnp.ones((8, 8)), jnp.ones(6)), "images: got shape"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


SMALL = {
    "canvas": 12,
    "digit_size": 8,
    "patch_size": 3,
    "num_patches": 2,
    "hidden": 8,
    "batch_size": 4,
    "steps": 1,
}
FIND = {"coarseness": 2, "window": 6, "score_hidden": 4, "reach": 1}
AIM = {"coarseness": 2, "glimpse_size": 4}


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("find", FIND | {"candidates": 3, "eval_canvas": 15}),
        *(
            pytest.param(*models, marks=pytest.mark.slow)
            for models in (
                ("find", FIND | {"use": "average", "head": "conv"}),
                ("attention", FIND),
                ("topk", FIND),
                ("argmax", FIND),
                ("box", AIM | {"head": "conv"}),
                ("quad", AIM),
                ("affine", AIM),
                ("stn", AIM),
                ("reinforce", AIM),
                ("conv", {}),
                ("pool", {}),
            )
        ),
    ],
)
def test_every_model_trains_for_a_step(model, flags, monkeypatch, tmp_path):
    monkeypatch.setattr(glimpse, "NUM_VALIDATION", 1)
    config = glimpse.Config(model=model, **SMALL, **flags)
    figures = glimpse.train_and_evaluate(config, tmp_path)
    assert {"error", "steps", "train_seconds", "compile_seconds", "test_examples"} <= set(figures)
    assert 0 <= figures["error"] <= 1 and figures["test_examples"] == 5026
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "validation_error" in row] == [0, 1]
    drawn = sorted(path.name for path in tmp_path.glob("glimpses*"))
    if model in ("conv", "pool"):
        assert not drawn
    else:
        of_large = ["glimpses-of-15.png"] if config.eval_canvas else []
        assert drawn == ["glimpses-0.png", "glimpses-1.png", *of_large, "glimpses.gif"]
        assert Image.open(tmp_path / "glimpses.gif").n_frames == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"canvas": 97}, "--coarseness must divide --canvas=97"),
        ({"canvas": 12}, "--canvas must be at least --digit_size=14"),
        ({"eval_canvas": 12}, "--eval_canvas must be at least --digit_size=14"),
        ({"candidates": 257}, "--candidates must be at most the 256 cells of --canvas=96"),
        ({"model": "conv", "coarseness": 2}, "--coarseness has no effect with --model=conv"),
        ({"model": "stn", "implementation": "cpu"}, "--implementation has no effect with --model"),
        ({"eval_patches": 3}, "--eval_patches has no effect with --eval_canvas=0"),
        ({"scored": 7}, "--scored must be at least --candidates"),
        ({"anywhere": 9}, "--anywhere must be at most --candidates=8"),
        ({"patch_size": 15}, "--patch_size must be at most --digit_size=14"),
        ({"scaling": 0.6, "augment_scaling": 0.5}, "--scaling and --augment_scaling"),
        ({"average": 1.0}, "--average must be below 1"),
    ],
)
def test_flags_that_contradict_each_other(flags, message):
    with pytest.raises(ValueError, match=message):
        glimpse.Config(**flags)
