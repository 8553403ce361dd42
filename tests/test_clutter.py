import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.clutter import clutter

SIZES = ("canvas", "num_patches", "patch_size", "rotation", "scaling")
draw = jax.jit(clutter, static_argnames=SIZES)
KEY = jax.random.key(0)
# Ten images of one colour each, so that every pixel of a canvas tells where it is from.
COLOURS = np.linspace(0.01, 0.1, 10, dtype=np.float32)
PLAIN = np.ones((10, 6, 6, 1), np.float32) * COLOURS[:, None, None, None]


def test_the_same_key_draws_the_same_canvases():
    arguments = {"canvas": 20, "num_patches": 3, "patch_size": 4, "rotation": 20.0, "scaling": 0.2}
    chosen = jnp.arange(10)
    canvases = draw(KEY, PLAIN, chosen, **arguments)
    np.testing.assert_array_equal(draw(KEY, PLAIN, chosen, **arguments), canvases)
    assert (draw(jax.random.key(1), PLAIN, chosen, **arguments) != canvases).any()


def test_a_digit_is_whole_and_everywhere_equally_often():
    n = 20000
    canvases = np.asarray(draw(KEY, PLAIN, jnp.full(n, 3), canvas=9))[..., 0]
    assert canvases.shape == (n, 9, 9)
    filled = canvases > 0
    assert (filled.sum((1, 2)) == 36).all()
    np.testing.assert_array_equal(canvases[filled], COLOURS[3])
    corners = np.stack([filled.any(2).argmax(1), filled.any(1).argmax(1)], -1)
    counts = np.bincount(corners @ [4, 1], minlength=16)
    assert len(counts) == 16
    # 5 standard deviations of a binomial.
    assert np.abs(counts - n / 16).max() < 5 * np.sqrt(n / 16)


def test_pieces_come_from_every_other_digit_equally_often():
    n = 9000
    # The digit itself is black: all that is seen is one piece.
    images = PLAIN.copy()
    images[4] = 0
    canvases = draw(KEY, images, jnp.full(n, 4), canvas=9, num_patches=1, patch_size=3)
    canvases = np.asarray(canvases)[..., 0]
    assert ((canvases > 0).sum((1, 2)) == 9).all()
    sources = np.abs(canvases.max((1, 2))[:, None] - COLOURS).argmin(1)
    counts = np.bincount(sources, minlength=10)
    assert counts[4] == 0
    assert np.abs(np.delete(counts, 4) - n / 9).max() < 5 * np.sqrt(n / 9)
    corners = np.stack([(canvases.max(2) > 0).argmax(1), (canvases.max(1) > 0).argmax(1)], -1)
    assert corners.min() == 0 and corners.max() == 6


def test_pieces_are_cut_out_anywhere():
    gradient = np.arange(36, dtype=np.float32).reshape(6, 6, 1) / 100
    images = np.stack([np.zeros_like(gradient), gradient])
    canvases = draw(KEY, images, jnp.zeros(500, int), canvas=6, num_patches=1, patch_size=4)
    tops = {round(float(c.max()) * 100) - 21 for c in canvases}
    assert tops == {0, 1, 2, 6, 7, 8, 12, 13, 14}


def test_what_overlaps_adds_up_and_is_clipped():
    images = np.full((2, 6, 6, 1), 0.3, np.float32)
    twice = draw(KEY, images, jnp.zeros(4, int), canvas=6, num_patches=1, patch_size=6)
    np.testing.assert_allclose(twice, 0.6, rtol=1e-6)
    often = draw(KEY, images, jnp.zeros(4, int), canvas=6, num_patches=5, patch_size=6)
    np.testing.assert_array_equal(often, 1)


def test_digits_turn_and_scale_about_their_centres():
    image = np.zeros((1, 21, 21, 1), np.float32)
    image[0, 6:15, 8:13] = 1
    chosen = jnp.zeros(300, int)
    scaled = np.asarray(draw(KEY, image, chosen, canvas=21, scaling=0.3)).sum((1, 2, 3)) / 45
    assert 0.4 < scaled.min() < 0.7 and 1.4 < scaled.max() < 1.8
    turned = np.asarray(draw(KEY, image, chosen, canvas=21, rotation=90.0))[..., 0]
    np.testing.assert_allclose(turned.sum((1, 2)), 45, rtol=0.05)
    place = np.arange(21) - 10
    np.testing.assert_allclose(turned.sum(1) @ place, 0, atol=0.5)
    spread_rows, spread_columns = (turned.sum(axis) @ place**2 for axis in (2, 1))
    assert (spread_rows > 2 * spread_columns).any() and (spread_columns > 2 * spread_rows).any()
    np.testing.assert_allclose(
        draw(KEY, image, chosen[:1], canvas=21, rotation=0.001), image, atol=1e-2
    )


def test_colours_keep_their_channels():
    images = np.broadcast_to(np.float32([0.1, 0.2, 0.3]), (2, 4, 4, 3))
    canvases = draw(KEY, images, jnp.array([0, 1]), canvas=8, num_patches=1, patch_size=2)
    seen = canvases[canvases[..., 0] > 0]
    np.testing.assert_allclose(seen / seen[:, :1], np.tile([[1, 2, 3]], (len(seen), 1)), rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"canvas": 5}, "canvas: got 5, want at least the digits' 6 x 6"),
        ({"canvas": 9, "num_patches": 1, "patch_size": 7}, "patch_size: got 7"),
    ],
)
def test_sizes_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        clutter(KEY, PLAIN, jnp.arange(2), **arguments)
