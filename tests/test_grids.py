import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from hyperlayer_jax import (
    RowSparseTensor,
    affine_means,
    bilinear,
    box_means,
    contract,
    quad_means,
)

RANDOM = np.random.default_rng(0)
IMAGE = (9, 12)


def unit(i, n):
    """Place i of n in [-1, 1], the only one in the middle."""
    return 2 * i / (n - 1) - 1 if n > 1 else 0.0


def grid_oracle(position, glimpse_shape, image_shape):
    """The means at position(v, h) for v, h in [-1, 1], in float64 and one at a time."""
    means = np.zeros((*glimpse_shape, 2))
    for i, j in np.ndindex(*glimpse_shape):
        place = position(unit(i, glimpse_shape[0]), unit(j, glimpse_shape[1]))
        for axis, size in enumerate(image_shape):
            means[i, j, axis] = np.clip((place[axis] + 1) / 2 * (size - 1), 0, size - 1)
    return means


def box_oracle(box, *shapes):
    return grid_oracle(lambda v, h: (box[0] + v * box[2], box[1] + h * box[3]), *shapes)


def quad_oracle(corners, *shapes):
    def position(v, h):
        weights = np.outer([(1 - v) / 2, (1 + v) / 2], [(1 - h) / 2, (1 + h) / 2])
        return (weights[..., None] * corners).sum((0, 1))

    return grid_oracle(position, *shapes)


def affine_oracle(matrix, *shapes):
    return grid_oracle(lambda v, h: matrix @ np.array([v, h, 1.0]), *shapes)


@pytest.mark.parametrize("glimpse_shape", [(5, 4), (1, 3), (1, 1)])
@pytest.mark.parametrize(
    ("means", "oracle", "axes", "spread"),
    [
        (box_means, box_oracle, (4,), 0.4),
        (box_means, box_oracle, (4,), 3.0),
        (quad_means, quad_oracle, (2, 2, 2), 0.9),
        (quad_means, quad_oracle, (2, 2, 2), 3.0),
        (affine_means, affine_oracle, (2, 3), 0.6),
        (affine_means, affine_oracle, (2, 3), 3.0),
    ],
)
def test_grids_are_those_of_the_oracle(means, oracle, axes, spread, glimpse_shape):
    parameters = RANDOM.uniform(-spread, spread, (2, 3, *axes)).astype(np.float32)
    got = jax.jit(lambda p: means(p, glimpse_shape, IMAGE))(parameters)
    assert got.shape == (2, 3, *glimpse_shape, 2) and got.dtype == jnp.float32
    for place in np.ndindex(2, 3):
        want = oracle(parameters[place].astype(np.float64), glimpse_shape, IMAGE)
        np.testing.assert_allclose(got[place], want, atol=1e-5)


def test_the_grid_reaches_both_edges_of_the_box():
    means = box_means(jnp.array([0.0, 0.25, 0.5, 0.25]), (4, 6), (9, 17))
    np.testing.assert_allclose(means[0, 0], [2, 8])
    np.testing.assert_allclose(means[-1, -1], [6, 12])


def test_the_identity_covers_the_image_pixel_by_pixel():
    identity = jnp.eye(2, 3)
    pixels = np.stack(np.indices(IMAGE), -1)
    np.testing.assert_allclose(affine_means(identity, IMAGE, IMAGE), pixels, atol=1e-5)
    np.testing.assert_allclose(
        box_means(jnp.array([0.0, 0, 1, 1]), IMAGE, IMAGE), pixels, atol=1e-5
    )


def test_degenerate_boxes_and_boxes_beyond_the_border():
    point = box_means(jnp.array([0.5, -0.5, 0.0, 0.0]), (3, 3), (9, 9))
    np.testing.assert_allclose(point, np.broadcast_to([6, 2], (3, 3, 2)))
    outside = box_means(jnp.array([5.0, -5, 1, 1]), (3, 3), (9, 9))
    np.testing.assert_allclose(outside, np.broadcast_to([8, 0], (3, 3, 2)))
    gradient = jax.grad(lambda box: box_means(box, (3, 3), (9, 9)).sum())
    assert np.isfinite(gradient(jnp.array([0.5, -0.5, 0.0, 0.0]))).all()
    np.testing.assert_array_equal(gradient(jnp.array([5.0, -5, 1, 1])), 0)


@pytest.mark.parametrize("shape", [(7, 5), (1, 5), (1, 1)])
def test_bilinear_reading_is_that_of_scipy(shape):
    image = RANDOM.normal(size=(*shape, 2)).astype(np.float32)
    last = np.array(shape) - 1
    means = (RANDOM.uniform(0, 1, (40, 2)) * last).astype(np.float32)
    means[:4] = [[0, 0], last, last / 2, np.round(last / 2)]
    indices, values = bilinear(jnp.asarray(means), shape)
    got = contract(RowSparseTensor(indices, values, (40,), shape), jnp.asarray(image))
    for channel in range(2):
        want = ndimage.map_coordinates(image[..., channel], means.T, order=1, mode="nearest")
        np.testing.assert_allclose(got[:, channel], want, atol=1e-5)
    np.testing.assert_allclose(values.sum(-1), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: box_means(jnp.ones((2, 5)), (3, 3), (9, 9)), r"boxes: got shape \(2, 5\)"),
        (lambda: quad_means(jnp.ones((2, 2, 2)), (3,), (9, 9)), r"glimpse_shape: got \(3,\)"),
        (lambda: bilinear(jnp.ones((4, 3)), (9, 9)), r"means: got shape \(4, 3\)"),
        (lambda: affine_means(jnp.ones((2, 3), int), (3, 3), (9, 9)), "matrices: got int32"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
