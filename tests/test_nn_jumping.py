"""Laws of jumps: who moves, where to, and that whatever jumps is found."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from laws import assert_close, assert_equal, call, floats, integers, largest_array

import hyperlayer_jax as hl
from hyperlayer_jax import nn
from hyperlayer_jax.nn import candidates, exploring

IN, OUT, EACH = (4, 8), (6,), 2
STEPS, UNTIL, EVERY = 600, 500, 10
best = jax.jit(exploring.best)


@given(integers(0, 3, (2, 3, 2)), integers(0, 3, (2, 9, 2)), floats(-4, 4, (2, 9)))
def test_the_best_places_are_new_different_and_those_of_the_largest_gradients(taken, new, size):
    arrays = map(np.asarray, (taken, new, size, *best(taken, new, size)))
    for taken_, new_, size_, places_, sizes_ in zip(*arrays, strict=True):
        sizes = {}
        for place, gradient in zip(map(tuple, new_.tolist()), np.abs(size_), strict=True):
            # The first of several that agree counts.
            sizes.setdefault(place, gradient)
        for place in map(tuple, taken_.tolist()):
            sizes.pop(place, None)
        want = sorted((size for size in sizes.values() if size > 0), reverse=True)[:3]
        assert_equal(sizes_, np.array(want + [0] * (3 - len(want)), np.float32))
        assert (places_[:, -1] == 1).all()
        places = [tuple(place) for place in places_[: len(want), :-1].astype(int).tolist()]
        assert len(set(places)) == len(places)
        assert [sizes[place] for place in places] == want


@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_the_least_useful_are_in_doubt(fraction):
    usefulness = jnp.array([[3.0, 1, 2, 5, 4], [1, 2, 3, 4, 5]])
    doubtful = nn.weakest(jax.random.key(0), usefulness, fraction)
    assert_equal(doubtful, usefulness <= round(5 * fraction))


def test_what_is_not_whole_of_a_fraction_is_left_to_chance():
    keys = jax.random.split(jax.random.key(0), 1000)
    count = jax.vmap(lambda key: nn.weakest(key, jnp.ones(2), 0.6).sum())(keys)
    assert set(np.unique(count)) == {1, 2}
    assert abs(float(count.astype(jnp.float32).mean()) - 1.2) < 0.05


def test_the_largest_gradients_win_be_their_places_old_or_new():
    places = jnp.arange(8.0).reshape(2, 4, 1)
    gradients = jnp.array([[5.0, -3, 9, 1], [1, 1, 1, 1]])
    doubtful = jnp.array([[True, True, False, True], [False] * 4])
    better, sizes = 100 + places, jnp.array([[4.0, 2, 1, 0], [9, 9, 9, 9]])
    to, moved = nn.jump(places, gradients, doubtful, better, sizes)
    assert_equal(moved, jnp.array([[False, False, False, True], [False] * 4]))
    assert_equal(to, places.at[0, 3].set(100))


@given(floats(0, 1, (5,)))
def test_draws_are_in_proportion(weights):
    chance = (jnp.arange(2000, dtype=jnp.float32) + 0.5) / 2000
    counts = np.bincount(candidates.draw(chance, weights), minlength=5) / 2000
    total = np.asarray(weights, np.float64) + 1e-3 * float(weights.mean())
    want = total / total.sum() if total.sum() > 0 else np.full(5, 0.2)
    np.testing.assert_allclose(counts, want, atol=2e-3)


def test_norms_are_those_of_the_rows_of_the_gradient():
    keys = jax.random.split(jax.random.key(0), 3)
    x, dy = jax.random.normal(keys[0], (5, 7)), jax.random.normal(keys[1], (6, 7))
    sums = candidates.random_sums(jax.random.uniform(keys[2], (4000, 6)), dy)
    found = candidates.norms(sums, x.T)
    assert_close(found, jnp.linalg.norm(x @ dy.T, axis=-1), rtol=0.05)


def layer(by_output, **options):
    options = {"use_bias": True, "rngs": nnx.Rngs(0)} | options
    return nn.SparseLinear(IN, OUT, EACH, by_output=by_output, **options)


def dense_gradient(x, dy):
    return np.einsum("bo,bij->oij", np.asarray(dy, np.float64), np.asarray(x, np.float64))


@pytest.mark.parametrize("by_output", [False, True])
def test_a_layer_looks_for_places_where_the_gradient_is_large_only_when_asked_to(by_output):
    model = layer(by_output)
    tuples = model.tuples
    x, dy = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(9, *IN), (9, *OUT)]))
    gradient = nnx.jit(nnx.grad(lambda model, x, dy: (model(x) * dy).sum()))

    def look():
        found = gradient(model, x, dy)["tuples"]
        return np.asarray(found["jumped"][...]), np.asarray(found["looks"][...])

    assert not any(found.any() for found in look())
    tuples.looks[...] = jnp.full_like(tuples.looks[...], 0.75)
    found, sizes = look()
    assert (found[..., -1] == 1).all()
    found, own = found[..., :-1], np.asarray(tuples.indices())
    if by_output:
        rows = np.broadcast_to(np.arange(OUT[0])[:, None, None], (*found.shape[:2], 1))
        found, own = (np.concatenate([rows, p], -1) for p in (found, own))
    there = sizes > 0
    assert there.mean() > 0.5
    dense = np.abs(dense_gradient(x, dy))
    assert_close(sizes, np.where(there, dense[tuple(np.moveaxis(found.astype(int), -1, 0))], 0))
    assert sizes[there].mean() > 1.2 * dense.mean()
    assert (np.diff(sizes, axis=-1) <= 0).all()
    every = np.concatenate([found[there].reshape(-1, 3), own.reshape(-1, 3)])
    assert len(np.unique(every, axis=0)) == len(every)
    # And evaluation computes the same as training.
    assert_equal(call(model, x), call(nnx.view(model, deterministic=True), x))


@pytest.mark.parametrize("by_output", [False, True])
def test_a_layer_in_training_has_all_derivatives_of_the_evaluated_one(by_output):
    """In a step that looks, too: what is found is no derivative, and appears in no other."""
    graphdef, params, rest = nnx.split(layer(by_output), nnx.Param, ...)
    params["tuples"]["looks"][...] = jnp.full_like(params["tuples"]["looks"][...], 0.75)
    xs = jax.random.normal(jax.random.key(0), (2, 3, *IN))

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(deterministic, xs):
        def loss(params, x):
            model = nnx.merge(graphdef, params, rest, copy=True)
            return (nnx.view(model, deterministic=deterministic)(x) ** 2).sum()

        def along(f):
            """The derivative of f in a direction."""
            return lambda *at: jax.jvp(f, at, jax.tree.map(jnp.ones_like, at))[1]

        def gradient(f):
            return jax.grad(f, (0, 1))

        functions = along(loss), gradient(loss), along(gradient(loss)), gradient(along(loss))
        return [jax.vmap(f, (None, 0))(params, xs) for f in functions]

    pairs = zip(
        *(jax.tree_util.tree_leaves_with_path(derivatives(view, xs)) for view in (False, True)),
        strict=True,
    )
    for (path, found), (_, want) in pairs:
        if not re.search("jumped|looks", jax.tree_util.keystr(path)):
            assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_a_look_inside_shard_map_finds_the_same():
    graphdef, params, rest = nnx.split(layer(True), nnx.Param, ...)
    params["tuples"]["looks"][...] = jnp.full_like(params["tuples"]["looks"][...], 0.75)
    x = jax.random.normal(jax.random.key(0), (3, *IN))
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, split = jax.P(), jax.P("batch")

    @jax.grad
    def gradient(params, x):
        return (nnx.merge(graphdef, params, rest, copy=True)(x) ** 2).sum()

    mapped = jax.shard_map(gradient, mesh=mesh, in_specs=(whole, split), out_specs=whole)
    found = jax.jit(mapped)(params, x)
    assert found["tuples"]["looks"][...].any()
    jax.tree.map(assert_close, found, jax.jit(gradient)(params, x))


def test_jumps_find_the_weights_of_another_layer():
    """A layer learns one of as many weights, exactly; on the way every law of places is kept."""
    teacher = nnx.view(layer(True, rngs=nnx.Rngs(7)), deterministic=True)
    model = layer(True)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, STEPS))
    optimizer = nn.jumps(jax.random.key(0), model, optimizer, until=UNTIL, every=EVERY)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def indices(params):
        return nnx.merge(graphdef, params, rest, copy=True).tuples.indices()

    def step(carry, key):
        params, state = carry
        x = jax.random.normal(key, (32, *IN))

        def loss(params):
            return ((nnx.merge(graphdef, params, rest, copy=True)(x) - teacher(x)) ** 2).mean()

        gradients = jax.grad(loss)(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
        moments = state.inner[0].mu["tuples"]["values"]
        return (params, state), (params["tuples"], indices(params), moments[...])

    keys = jax.random.split(jax.random.key(1), STEPS)
    train = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))
    (params, _), (history, places, moments) = train((params, optimizer.init(params)))
    places, values = np.asarray(places), np.asarray(history["values"][...])
    assert (places >= 0).all() and (places < np.array(IN)).all()
    flat = places @ [IN[1], 1]
    assert (np.diff(np.sort(flat, -1), axis=-1) > 0).all()
    moved = np.diff(flat, axis=0) != 0
    jumped = 1 + np.flatnonzero(moved.any((1, 2)))
    assert jumped.size and (jumped % EVERY == EVERY // 2).all() and jumped.max() < UNTIL
    assert not values[1:][moved].any() and not np.asarray(moments)[1:][moved].any()
    looks = np.asarray(history["looks"][...]).any((1, 2))
    assert_equal(np.flatnonzero(looks) + 1, np.arange(EVERY // 2, UNTIL, EVERY))
    student = nnx.merge(graphdef, params, rest)
    dense = [hl.todense(layer.weight()) for layer in (student, teacher)]
    assert_close(*dense, rtol=0.02, atol=0.02)


def test_jumps_work_behind_the_optimizer_of_flax():
    model = nnx.List([layer(False)])
    optimizer = nnx.Optimizer(
        model, nn.jumps(jax.random.key(0), model, optax.sgd(0.1), until=9, every=2), wrt=nnx.Param
    )
    first = np.asarray(model[0].tuples.indices())
    x = jax.random.normal(jax.random.key(0), (3, *IN))
    gradient = nnx.jit(nnx.grad(lambda model: ((model[0](x) - 1) ** 2).sum()))
    update = nnx.jit(lambda optimizer, model, gradient: optimizer.update(model, gradient) and None)
    for changed in (False, True):
        update(optimizer, model, gradient(model))
        assert (np.asarray(model[0].tuples.indices()) != first).any() == changed


@pytest.mark.parametrize("by_output", [False, True])
def test_nothing_of_the_dense_size_is_formed(by_output):
    size = 10_000
    model = nn.SparseLinear(size, size, EACH, by_output=by_output, rngs=nnx.Rngs(0))
    optimizer = nn.jumps(jax.random.key(0), model, optax.adam(0.1), until=100)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def step(params, state, x):
        def loss(params):
            return (nnx.merge(graphdef, params, rest, copy=True)(x) ** 2).sum()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("standard"):
        largest = largest_array(step, params, optimizer.init(params), jnp.ones((2, size)))
    assert largest < size * size / 10


@pytest.mark.parametrize("jumped", [False, True])
def test_weight_decay_does_not_move_places(jumped):
    """Be they the first ones, or such as tuples have jumped to."""
    tuples = nn.PlacedTuples((3,), 4, (100, 50), rngs=nnx.Rngs(0))
    if jumped:
        tuples.jumped[...] = tuples.jumped[...].at[:, 0].set(jnp.array([99.0, 31, 1]))
    optimizer = nnx.Optimizer(tuples, optax.adamw(0.1, weight_decay=0.1), wrt=nnx.Param)
    loss = lambda tuples: (tuples().values ** 2).sum() + tuples().means.sum()  # noqa: E731

    @nnx.jit
    def step(tuples, optimizer):
        optimizer.update(tuples, nnx.grad(loss)(tuples))

    first, values = np.asarray(tuples.indices()), np.asarray(tuples.values[...])
    assert (first[:, 0] == [99, 31]).all() == jumped
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(100):
            step(tuples, optimizer)
    assert_equal(tuples.indices(), first)
    assert (np.asarray(tuples.values[...]) != values).all()
    if jumped:
        assert (np.asarray(tuples.jumped[:, 0, -1]) < 0.5).all()


@pytest.mark.parametrize("values", [None, 1.0])
def test_a_frozen_layer_is_the_evaluated_one_and_trains_values_alone(values):
    model = nnx.List([nn.SparseLinear(IN, OUT, EACH, values=values, rngs=nnx.Rngs(0))])
    frozen = nn.freeze(model)[0]
    x = jax.random.normal(jax.random.key(0), (3, *IN))
    assert_close(call(frozen, x), call(nnx.view(model[0], deterministic=True), x))
    assert_close(jnp.tensordot(x, hl.todense(frozen.weight()), ((1, 2), (1, 2))), call(frozen, x))
    assert [path[-1] for path, _ in nnx.to_flat_state(nnx.state(frozen, nnx.Param))] == ["values"]
    assert type(model[0].tuples) is not type(frozen.tuples)


def test_places_are_spread_evenly_and_all_different():
    tuples = nn.PlacedTuples((3,), 7, (2, 5), rngs=nnx.Rngs(0))
    flat = np.asarray(tuples.places[...]) @ [5, 1]
    assert (np.diff(flat, axis=-1) > 0).all()
    edges = np.arange(8) * 10 // 7
    assert (flat >= edges[:-1]).all() and (flat < edges[1:]).all()


ERRORS = {
    "num_tuples: got 5, want at most 4": lambda: nn.PlacedTuples((), 5, (4,), rngs=nnx.Rngs(0)),
    "shape: got .*16777217": lambda: nn.PlacedTuples((), 5, (2**24 + 1,), rngs=nnx.Rngs(0)),
    "every: got 0": lambda: nn.jumps(
        jax.random.key(0), layer(False), optax.sgd(1.0), until=3, every=0
    ),
    "until: got -1": lambda: nn.jumps(jax.random.key(0), layer(False), optax.sgd(1.0), until=-1),
    "fraction: got 2": lambda: nn.jumps(
        jax.random.key(0), layer(False), optax.sgd(1.0), until=3, fraction=2
    ),
    "model: got none": lambda: nn.jumps(
        jax.random.key(0), nnx.Linear(2, 3, rngs=nnx.Rngs(0)), optax.sgd(1.0), until=3
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_wrong_input_is_an_error_that_names_the_argument(message):
    with pytest.raises(ValueError, match=message):
        ERRORS[message]()
