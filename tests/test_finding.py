import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from laws import call

from hyperlayer_jax import nn

ROWS, COLUMNS, CELL = 4, 3, 5
SHAPE = (ROWS * CELL, COLUMNS * CELL)


def find(k=4, **arguments):
    return nn.FindingGlimpses((3, 5), k, **{"num_anywhere": 1, "rngs": nnx.Rngs(0)} | arguments)


def example(*batch, channels=1):
    images = jax.random.uniform(jax.random.key(0), (*batch, *SHAPE, channels))
    maps = jax.random.normal(jax.random.key(1), (*batch, ROWS, COLUMNS, 4))
    return images, maps


def middles(maps):
    """Maps whose means are the middles of cells, with next to no sigma."""
    return maps.at[..., 1:3].set(0).at[..., 3].set(-50)


def windows(image, centres):
    """The 3 x 5 pixels around every centre, 0 beyond the image."""
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    return np.stack([padded[r + 1 : r + 4, c : c + 5] for r, c in centres])


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_what_is_read_are_the_pixels_around_the_cells_of_the_largest_scores(batch):
    images, maps = example(*batch, channels=2)
    seen = call(nnx.view(find(), deterministic=True), images, middles(maps))
    assert seen.patches.shape == (*batch, 4, 3, 5, 2) and seen.sigmas.shape == (*batch, 4, 2)
    for place in np.ndindex(*batch):
        scores = np.asarray(maps[place][..., 0]).ravel()
        cells = np.argsort(-scores)[:4]
        centres = np.stack(np.unravel_index(cells, (ROWS, COLUMNS)), -1) * CELL + CELL // 2
        np.testing.assert_array_equal(seen.means[place][:, 1, 2], centres)
        want = windows(np.asarray(images[place]), centres)
        np.testing.assert_allclose(seen.patches[place], want, atol=1e-6)
        chances = np.exp(scores[cells]) / np.exp(scores[cells]).sum()
        np.testing.assert_allclose(np.exp(seen.log_chances[place]), chances, rtol=1e-5)


def test_means_stay_in_their_cells_and_on_the_image():
    images, maps = example(8)
    means = np.asarray(call(find(12, num_anywhere=12), images, 2 * maps).means[:, :, 1, 2])
    cells = np.sort(np.floor((means + 0.5) / CELL) @ [COLUMNS, 1])
    np.testing.assert_array_equal(cells, np.tile(np.arange(12), (8, 1)))
    assert means.min() >= 0 and (means.max((0, 1)) <= np.array(SHAPE) - 1).all()


def test_candidates_differ_and_are_drawn_by_scores_and_from_everywhere():
    scores = jnp.tile(jnp.log(jnp.arange(1, 13.0)), (6000, 1))
    places = jnp.zeros((6000, 12, 2), int)
    cells = np.asarray(nnx.jit(lambda m, *a: m.candidates(*a))(find(2), scores, places))
    assert (cells[:, 0] != cells[:, 1]).all()
    led = np.bincount(cells[:, 0], minlength=12) / 6000
    share = np.arange(1, 13) / 78
    assert np.abs(led - share).max() < 5 * np.sqrt(share.max() / 6000)
    others = np.bincount(cells[:, 1], minlength=12) / 6000
    # Alike of all that were not led to.
    assert np.abs(others - (1 - share) / 11).max() < 5 * np.sqrt(1 / 11 / 6000)


def test_candidates_stay_apart_while_there_are_others():
    scores = jnp.array([9.0, 8, 7, 6, 5, 4, 3])
    cells = jnp.stack([jnp.arange(7), jnp.arange(7) % 2], -1)
    choose = nnx.jit(lambda m, *a: m.candidates(*a))
    far = choose(nnx.view(find(3, apart=3), deterministic=True), scores, cells)
    np.testing.assert_array_equal(far, [0, 3, 6])
    crowded = choose(nnx.view(find(5, apart=4), deterministic=True), scores, cells)
    assert list(crowded[:2]) == [0, 4] and len(set(crowded.tolist())) == 5
    impossible = jnp.where(jnp.arange(7) > 0, -jnp.inf, scores)
    others = choose(nnx.view(find(5, apart=4), deterministic=True), impossible, cells)
    assert len(set(others.tolist())) == 5
    drawn = np.asarray(choose(find(3, apart=3, num_anywhere=1), scores, cells))
    assert abs(drawn[0] - drawn[1]) >= 3 and len(set(drawn.tolist())) == 3


def test_tiles_are_read_as_the_image_that_they_make():
    images, maps = example(2, channels=2)
    images = images.at[:, 5:15].set(0)
    tiles = images.reshape(2, ROWS, CELL, COLUMNS, CELL, 2).swapaxes(2, 3).reshape(-1, 5, 5, 2)
    there = np.asarray(tiles).any((1, 2, 3))
    table = np.where(there, there.cumsum() - 1, -1).reshape(2, ROWS, COLUMNS)
    model = nnx.view(find(8), deterministic=True)
    want = call(model, images, maps)
    tiled = nn.TiledImages(jnp.asarray(table), tiles[there])
    assert tiled.shape == images.shape and len(tiled.tiles) < len(tiles)
    got = call(model, tiled, maps)
    np.testing.assert_allclose(got.patches, want.patches, atol=1e-6)
    whole = np.stack(np.indices(SHAPE), -1)[None].repeat(2, 0)
    few = nn.TiledImages(tiled.table, jnp.round(255 * tiled.tiles).astype(jnp.uint8))
    np.testing.assert_allclose(few.read(jnp.asarray(whole)), images, atol=0.5 / 255 + 1e-6)
    np.testing.assert_array_equal(few.whole(), few.read(jnp.asarray(whole)))
    none = nn.TiledImages(tiled.table[:0], tiled.tiles)
    assert none.read(jnp.asarray(whole)[:0]).shape == none.whole().shape == (0, *images.shape[1:])


def test_another_number_of_candidates_in_evaluation():
    images, maps = example(2)
    few = call(nnx.view(find(), deterministic=True), images, maps)
    more = call(nnx.view(find(), deterministic=True, num_candidates=7), images, maps)
    assert more.patches.shape[1] == 7
    np.testing.assert_allclose(more.patches[:, :4], few.patches, rtol=1e-6)


def test_of_the_cells_that_are_given_only_those_are_read():
    images, maps = example(2)
    cells = np.stack(np.indices((ROWS, COLUMNS), np.int32), -1).reshape(-1, 2)
    chosen = np.stack([np.arange(7, 1, -1), np.arange(6)]).astype(np.int32)
    flat = jnp.take_along_axis(maps.reshape(2, -1, 4), chosen[..., None], 1)
    few = nnx.jit(lambda m, *a: m(*a[:2], cells=a[2], grid_shape=(ROWS, COLUMNS)))(
        nnx.view(find(), deterministic=True), images, flat, jnp.asarray(cells[chosen])
    )
    allowed = np.zeros((2, ROWS * COLUMNS), bool)
    np.put_along_axis(allowed, chosen, True, 1)
    least = jnp.where(allowed.reshape(2, ROWS, COLUMNS), maps[..., 0], -100.0)
    want = call(nnx.view(find(), deterministic=True), images, maps.at[..., 0].set(least))
    for got, expected in zip(jax.tree.leaves(few), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_what_moves_by_a_cell_is_found_there():
    images, maps = example(2)
    image, shifted = images[:, :-CELL], images[:, CELL:]
    model = nnx.view(find(3), deterministic=True)
    maps = maps.at[:, 1:-1, :, 0].add(20)  # What is found is on both canvases.
    maps = middles(maps)
    first, second = jax.device_get(
        (call(model, image, maps[:, :-1]), call(model, shifted, maps[:, 1:]))
    )
    rows = first.means[..., 0]
    inside = (rows.max((2, 3)) < SHAPE[0] - CELL) & (rows.min((2, 3)) >= CELL)
    assert inside.any()
    np.testing.assert_array_equal(first.means[inside], second.means[inside] + [CELL, 0])
    np.testing.assert_allclose(first.patches[inside], second.patches[inside], atol=1e-6)


def test_scores_learn_what_is_useful_and_means_move_towards_it():
    images = jnp.zeros((16, *SHAPE, 1)).at[:, 8, 6].set(1.0)
    sampler = nn.Sampler(num_global=0, num_local=4, region=5, rngs=nnx.Rngs(1))
    graphdef, state = nnx.split(find(6, num_anywhere=3, sigma_scale=0.4, sampler=sampler))

    @jax.jit
    def step(maps, state):
        def loss(maps):
            model = nnx.merge(graphdef, state, copy=True)
            seen = model(images, jnp.broadcast_to(maps, (16, *maps.shape)))
            light = nn.average(seen, seen.patches[:, :, 1, 2])
            return -light.mean(), nnx.state(model)

        gradients, state = jax.grad(loss, has_aux=True)(maps)
        return maps - 0.1 * gradients / (optax.tree.norm(gradients) + 1e-12), state

    maps = jnp.zeros((ROWS, COLUMNS, 4))
    for _ in range(200):
        maps, state = step(maps, state)
    best = int(maps[..., 0].argmax())
    assert best == 1 * COLUMNS + 1
    mean = np.array([1, 1]) * CELL + 2 + np.tanh(maps[1, 1, 1:3]) * CELL / 2
    assert np.abs(mean - [8, 6]).max() < 0.5


def test_answers_are_weighed_by_chances():
    images, maps = example(3)
    seen = call(find(), images, maps)
    logits = jax.random.normal(jax.random.key(2), (3, 4, 7))
    chances = np.exp(np.asarray(seen.log_chances, np.float64))[..., None]
    each = np.exp(np.asarray(jax.nn.log_softmax(logits), np.float64))
    np.testing.assert_allclose(nn.mixture(seen, logits), np.log((chances * each).sum(1)), rtol=1e-4)
    want = (chances * np.asarray(logits)).sum(1)
    np.testing.assert_allclose(nn.average(seen, logits), want, rtol=1e-4, atol=1e-6)


def test_half_precision_images_keep_their_dtype_and_exact_means():
    images, maps = example(2)
    seen = call(find(), images.astype(jnp.bfloat16), maps.astype(jnp.bfloat16))
    assert seen.patches.dtype == jnp.bfloat16 and seen.means.dtype == jnp.float32
    for weigh in (nn.mixture, nn.average):
        assert weigh(seen, seen.patches[:, :, 0, :, 0]).dtype == jnp.float32


@pytest.mark.filterwarnings("error::UserWarning")
def test_float64_is_what_jax_makes_of_it():
    model, arrays = nnx.view(find(), deterministic=True), example(2)
    wide = [np.asarray(x, np.float64) for x in arrays]
    np.testing.assert_array_equal(model(*wide).patches, model(*arrays).patches)
    with jax.enable_x64(True):
        assert model(*arrays).means.dtype == jnp.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: find(0), "num_candidates: got 0"),
        (lambda: find(2, num_anywhere=3), "num_anywhere: got 3"),
        (lambda: find(apart=0), "apart: got 0"),
        (lambda: find(sigma_scale=0.0), "sigma_scale: got 0.0"),
        (lambda: find(min_sigma=-1.0), "min_sigma: got -1.0"),
        (lambda: find(13)(*example(2)), "maps: got 12 cells, want at least 13"),
        (lambda: find()(example(2)[0], example(3)[1]), "maps: got shape"),
        (lambda: find()(example(2)[0], example(2)[1][..., :3]), "maps: got shape"),
        (
            lambda: find()(example(2)[0], jnp.ones((2, 5, 4)), cells=jnp.ones((2, 5, 2), int)),
            "grid_shape: got",
        ),
        (lambda: nnx.view(find(), num_candidates=0), "num_candidates: got 0"),
        (
            lambda: nnx.view(find(num_anywhere=2), num_candidates=1)(*example(2)),
            "num_candidates: got 1, want at least num_anywhere=2",
        ),
        (
            lambda: nn.mixture(find()(*example(2)), jnp.ones((2, 4, 5), jnp.int32)),
            "logits: got int32",
        ),
        (lambda: nn.mixture(find()(*example(2)), jnp.ones((2, 3, 5))), "logits: got"),
        (
            lambda: nn.average(nn.Glimpses(*[jnp.ones((2, 4))] * 3), jnp.ones((2, 4, 1))),
            "glimpses: got some without chances",
        ),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
