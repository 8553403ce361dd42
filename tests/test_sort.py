"""Laws of the differentiable sort and of what is made of it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from jax.test_util import check_grads
from laws import (
    FLOATS,
    assert_close,
    assert_equal,
    assert_finite,
    batch_mesh,
    floats,
    largest_array,
    program,
)

import hyperlayer_jax as hl

KEY = jax.random.key(0)
PROPOSALS = ("local", "uniform")
sort = jax.jit(hl.soft_quicksort, static_argnames=("num_samples", "proposal"))
todense = jax.jit(hl.todense)
# One program for most examples of six items: four partners at most, and two blocks at level 0.
SIZE = 6
OPTIONS = {"num_samples": 2, "certainty": jnp.float32(2.0)}


def example(s, batch=(2,), dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(*batch, s, 3)), dtype)
    return x, jnp.asarray(rng.normal(size=(*batch, s)), dtype)


def weighted_sum(levels):
    flat = [a.reshape(-1).astype(jnp.float32) for a in (*levels.items, *levels.scores)]
    flat = jnp.concatenate(flat)
    return (flat * jnp.cos(jnp.arange(flat.size, dtype=jnp.float32))).sum()


@functools.partial(jax.jit, static_argnames=("num_samples", "proposal"))
def gradients(key, x, scores, **options):
    """Of a weighted sum of all levels."""
    loss = lambda x, scores: weighted_sum(hl.soft_quicksort(key, x, scores, **options))  # noqa: E731
    return jax.grad(loss, (0, 1))(x, scores)


def scores_of(kind, s):
    rng = np.random.default_rng(s)
    return {
        "random": lambda: rng.normal(size=(2, s)),
        "ties": lambda: rng.integers(0, 3, (2, s)),
        "equal": lambda: np.zeros((2, s)),
        "huge": lambda: rng.normal(size=(2, s)) * 1e4,
        "extreme": lambda: rng.choice([-3e38, 0, 3e38], (2, s)),
        "far apart": lambda: rng.permuted(np.tile(np.linspace(-1e30, 1e30, s), (2, 1)), axis=1),
        "signed zeros": lambda: rng.choice([-0.0, 0.0], (2, s)),
    }[kind]()


@pytest.mark.parametrize("s", [1, 2, 3, 6, 9])
def test_without_samples_it_is_the_exact_stable_sort(s):
    x = jnp.broadcast_to(jnp.arange(s, dtype=jnp.float32)[:, None], (2, s, 1))
    for kind in ("random", "ties", "equal", "extreme", "signed zeros"):
        scores = jnp.asarray(scores_of(kind, s), jnp.float32)
        levels = sort(None, x, scores, num_samples=0, certainty=1.0)
        order = np.argsort(np.asarray(scores), axis=-1, kind="stable")
        assert_equal(levels.items[-1][..., 0], order.astype(np.float32))
        assert_equal(levels.scores[-1], np.take_along_axis(np.asarray(scores), order, -1))
        assert len(levels.permutations) == (s - 1).bit_length()


def test_it_is_exact_beyond_46341_items():
    """The square of which no int32 holds."""
    s = 46_343
    scores = jnp.asarray(np.random.default_rng(0).permutation(s), jnp.float32)
    options = {"num_samples": 2, "certainty": 100.0}
    assert_equal(jax.jit(functools.partial(hl.soft_rank, **options))(scores), scores)
    many = jnp.asarray(np.random.default_rng(0).integers(0, 99, 1_000_000), jnp.float32)
    _, _, indices = jax.jit(functools.partial(hl.soft_top_k, k=many.size, num_samples=0))(many)
    assert_equal(indices, np.argsort(-np.asarray(many), kind="stable").astype(np.int32))


@pytest.mark.parametrize("s", [*range(1, 20), 64, 65])
def test_buckets_halve_until_they_hold_one_item(s):
    levels = hl.bucket_starts(s)
    assert len(levels) == 1 + int(np.ceil(np.log2(s)))
    assert levels[0].tolist() == [0] and levels[-1].tolist() == list(range(s))
    for starts, following in itertools.pairwise(levels):
        width = 2 * following[1]
        assert starts.tolist() == list(range(0, s, width))
        assert set(starts) <= set(following) and (np.diff(following) == width // 2).all()


@pytest.mark.parametrize("proposal", PROPOSALS)
@given(data=st.data())
def test_permutations_are_doubly_stochastic_and_keep_to_their_buckets(proposal, data):
    s = SIZE
    scores = data.draw(floats(-3, 3, (2, s)))
    key = jax.random.key(data.draw(st.integers(0, 2**32 - 1)))
    x, _ = example(s)
    levels = sort(key, x, scores, proposal=proposal, **OPTIONS)
    bucket_of = [
        np.searchsorted(start, np.arange(s), side="right") for start in hl.bucket_starts(s)
    ]
    order = np.argsort(np.asarray(scores), axis=-1, kind="stable")
    for t, permutation in enumerate(levels.permutations):
        dense = np.asarray(todense(permutation))
        assert (dense >= -1e-6).all()
        np.testing.assert_allclose(dense.sum(-1), 1, 1e-5)
        np.testing.assert_allclose(dense.sum(-2), 1, 1e-5)
        assert_close(levels.items[t + 1], dense @ np.asarray(levels.items[t], np.float64))
        moved = (dense @ np.asarray(levels.scores[t])[..., None])[..., 0]
        assert_close(levels.scores[t + 1], moved)
        if t == 0:
            dense = np.take_along_axis(dense, order[:, None, :], -1)
        mixes = bucket_of[t][:, None] != bucket_of[t][None]
        assert (np.where(mixes, dense, 0) == 0).all()


@pytest.mark.parametrize(("s", "num_samples"), [(SIZE, 2), (6, 4), (8, 4), (5, 3)])
def test_exchanges_have_the_weights_of_the_method(s, num_samples):
    """Level by level, from the scores that the level before has left (equation 11)."""
    x, scores = example(s, ())
    certainty = jnp.float32(2.0)
    levels = sort(None, x, jnp.sort(scores), num_samples=num_samples, certainty=certainty)
    width = 1 << (num_samples - 1).bit_length()
    bits = (s - 1).bit_length()
    for t, permutation in enumerate(levels.permutations):
        half = 1 << (bits - 1 - t)
        want = oracle.soft_exchange(levels.scores[t], half, width, 2.0)
        assert_close(hl.todense(permutation), want)


@pytest.mark.parametrize("s", [3, 4])
def test_random_candidates_have_the_weights_of_the_paper(s):
    """All splits are candidates after enough draws; each weighs its probability (section 3.3)."""
    x, scores = example(s, ())
    options = {"num_samples": 300, "certainty": 0.7, "proposal": "uniform"}
    levels = sort(KEY, x, jnp.sort(scores), **options)
    upper = [set(c) for c in itertools.combinations(range(s), s - 2)]
    want = oracle.soft_split(np.asarray(jnp.sort(scores), np.float64), 2, upper, 0.7)
    assert_close(hl.todense(levels.permutations[0]), want)
    if s == 4:
        got = np.asarray(hl.todense(levels.permutations[1]))
        for half in (slice(0, 2), slice(2, 4)):
            bucket = np.asarray(levels.scores[1][half], np.float64)
            want = oracle.soft_split(bucket, 1, [{0}, {1}], 0.7)
            np.testing.assert_allclose(got[half, half], want, 1e-4, 1e-5)


def test_certainty_makes_it_exact():
    x, _ = example(SIZE)
    scores = jnp.asarray(scores_of("random", SIZE), jnp.float32)
    for proposal in PROPOSALS:
        soft, sure = (
            sort(KEY, x, scores, num_samples=2, certainty=jnp.float32(c), proposal=proposal)
            for c in (0.1, 1e4)
        )
        assert_close(sure.scores[-1], jnp.sort(scores))
        assert np.abs(soft.scores[-1] - jnp.sort(scores)).max() > 0.1


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_is_finite_whatever_the_scores(dtype, proposal):
    x, _ = example(SIZE, dtype=dtype)
    options = {"num_samples": 2, "certainty": jnp.float32(1e4), "proposal": proposal}
    for kind in ("random", "ties", "equal", "huge", "far apart"):
        scores = jnp.asarray(scores_of(kind, SIZE), dtype)
        levels = sort(KEY, x, scores, **options)
        assert all(a.dtype == dtype for a in (*levels.items, *levels.scores))
        assert_finite((levels, gradients(KEY, x, scores, **options)))


def test_gradients_reach_every_item_and_score_and_nan_does_no_harm_elsewhere():
    x, scores = example(SIZE)
    options = {"num_samples": 2, "certainty": jnp.float32(1e4)}
    got = gradients(KEY, x, scores, **(options | {"certainty": jnp.float32(1.0)}), proposal="local")
    assert all((np.asarray(g) != 0).all() for g in got)
    broken = sort(KEY, x, scores.at[0, 2].set(jnp.nan), **options, proposal="local")
    assert np.isnan(broken.scores[-1][0]).any()
    assert_finite(broken.scores[-1][1])


def test_all_derivatives():
    """Forward and reverse mode, and of each other; each function once."""
    with jax.enable_x64(True):
        x, scores = example(4, dtype=jnp.float64)
        options = {"num_samples": 2, "certainty": 0.7}
        quicksort = lambda x, s: hl.soft_quicksort(None, x, s, **options).items[1:]  # noqa: E731
        check_grads(jax.jit(quicksort), (x, scores), 1, ["fwd", "rev"], 1e-5, 1e-5)
        rank = jax.jit(functools.partial(hl.soft_rank, **options))
        check_grads(rank, (scores,), 2, ["fwd", "rev"], 1e-5, 1e-5)
        paper = lambda x, s: hl.soft_quicksort(  # noqa: E731
            KEY, x, s, num_samples=4, certainty=0.5, proposal="uniform"
        ).items[-1]
        check_grads(jax.jit(paper), (x, scores), 1, ["fwd", "rev"], 1e-5, 1e-5)


def test_targets_travel_back_through_the_transposes():
    """Without samples, the transposes undo the sort."""
    x, scores = example(9)
    levels = sort(None, x, scores, num_samples=0, certainty=1.0)
    assert_close(levels.permutation.apply_transpose(levels.items[-1]), x)
    assert_equal(levels.permutation.ranks(), np.argsort(np.argsort(scores)).astype(np.float32))


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_a_permutation_and_its_transpose_are_those_of_all_levels(proposal):
    x, scores = example(SIZE)
    levels = sort(KEY, x, scores, **OPTIONS, proposal=proposal)
    assert_close(levels.permutation.apply(x), levels.items[-1])
    back = levels.permutation.carry_back(x)
    assert len(back) == len(levels.items)
    for t, permutation in enumerate(levels.permutations):
        dense = np.asarray(todense(permutation), np.float64)
        assert_close(back[t], np.swapaxes(dense, -1, -2) @ np.asarray(back[t + 1]))


def test_only_the_order_and_the_gaps_of_scores_matter():
    """Scores and certainty come as a product of differences."""
    x, scores = example(SIZE)
    want = sort(None, x, scores, **OPTIONS, proposal="local").items
    assert_close(sort(None, x, scores + 8, **OPTIONS, proposal="local").items, want, 1e-4, 1e-4)
    half = {**OPTIONS, "certainty": jnp.float32(0.5)}
    assert_close(sort(None, x, 4 * scores, **half, proposal="local").items, want)


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_a_set_among_others_is_sorted_as_it_is_alone(proposal):
    """What is beyond its length stays and has no influence, NaN included."""
    x, scores = example(SIZE, (4,))
    lengths = jnp.array([0, 1, 4, 6], jnp.int32)
    absent = np.arange(SIZE) >= np.asarray(lengths)[:, None]
    padded = jnp.where(absent[..., None], jnp.nan, x), jnp.where(absent, jnp.nan, scores)
    run = jax.jit(
        functools.partial(hl.soft_quicksort, num_samples=2, certainty=2.0, proposal=proposal)
    )
    got = run(KEY, *padded, lengths=lengths)
    assert_equal(np.isnan(got.scores[-1]), absent)
    assert_finite([p.values for p in got.permutations])
    if proposal == "local":
        for i in (2, 3):
            n = int(lengths[i])
            alone = hl.soft_sort(scores[i, :n], num_samples=2, certainty=2.0)
            assert_close(got.scores[-1][i, :n], alone)

        def loss(scores):
            ranks = hl.soft_rank(scores, num_samples=2, certainty=2.0, lengths=lengths)
            return jnp.where(absent, 0, ranks**2).sum()

        gradient = jax.jit(jax.grad(loss))(padded[1])
        assert_finite(gradient)
        assert (np.where(absent, gradient, 0) == 0).all()


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_sharding_and_mapping_the_batch_change_nothing(proposal):
    x, scores = example(5, (8,))
    options = {"num_samples": 2, "certainty": jnp.float32(2.0), "proposal": proposal}
    want = gradients(KEY, x, scores, **options)
    spec = PartitionSpec("data")
    sharded = jax.device_put((x, scores), NamedSharding(batch_mesh(), spec))
    assert_close(gradients(KEY, *sharded, **options), want)

    def each(x, scores):
        loss = lambda x, s: (hl.soft_quicksort(KEY, x, s, **options).items[-1] ** 2).sum()  # noqa: E731
        return jax.grad(loss, (0, 1))(x, scores)

    mapped = jax.jit(jax.vmap(each))(x, scores)
    by_shard = jax.shard_map(jax.vmap(each), mesh=batch_mesh(), in_specs=spec, out_specs=spec)
    assert_close(jax.jit(by_shard)(x, scores), mapped)
    if proposal == "local":
        assert_close(mapped, jax.jit(each)(x, scores))


@pytest.mark.parametrize("batch", [(), (0,), (2, 3)])
def test_any_leading_axes(batch):
    x, scores = example(5, batch)

    def run(x, scores):
        levels = hl.soft_quicksort(None, x, scores, num_samples=2, certainty=1.0)
        return levels, levels.permutations

    levels, permutations = jax.eval_shape(run, x, scores)
    assert all(a.shape == x.shape for a in levels.items)
    assert all(a.shape == scores.shape for a in levels.scores)
    assert [p.values.shape for p in permutations] == [(*batch, 5, p) for p in (3, 3, 2)]
    assert jax.eval_shape(hl.soft_rank, scores).shape == scores.shape


def test_programs_and_memory_do_not_grow_with_the_square():
    run = jax.grad(lambda scores: (hl.soft_rank(scores, num_samples=8) ** 2).sum())
    small, large = (jax.ShapeDtypeStruct((s,), jnp.float32) for s in (64, 4096))
    assert len(program(run, small)) == len(program(run, large))
    # For each of the nine levels above a block, a dense permutation of every pair of blocks.
    assert largest_array(run, large) <= 9 * 16 * 4096


THIN = (
    jax.jit(hl.soft_sort),
    jax.jit(hl.soft_rank),
    jax.jit(hl.soft_top_k, static_argnums=1),
    jax.jit(hl.soft_quantile),
)


def test_ranks_top_k_and_quantiles_are_those_of_an_exact_sort_if_certain():
    _, scores = example(7)
    sure = {"certainty": 1e6}
    soft_sort, soft_rank, soft_top_k, soft_quantile = THIN
    assert_close(soft_sort(scores, **sure), jnp.sort(scores))
    assert_close(soft_rank(scores, **sure), jnp.argsort(jnp.argsort(scores)))
    values, indices = jax.lax.top_k(scores, 3)
    top = soft_top_k(scores, 3, **sure)
    assert_close(top.values, values)
    assert_equal(top.indices, indices)
    assert_close(top.mask, (scores >= values[:, -1:]).astype(jnp.float32))
    q = jnp.array([[0.0, 0.5], [0.3, 1.0]])
    assert_close(
        soft_quantile(scores, q, **sure), jnp.quantile(scores, q.ravel(), axis=-1).reshape(2, 2, 2)
    )


def test_soft_ranks_are_those_of_the_permutation_and_sums_are_kept():
    _, scores = example(7)
    soft_sort, soft_rank, soft_top_k, soft_quantile = THIN
    ranks = soft_rank(scores)
    assert_close(ranks, jax.jit(lambda scores: hl.soft_argsort(scores).ranks())(scores))
    assert_close(ranks.sum(-1), jnp.full(2, 21.0))
    assert np.abs(ranks - jnp.round(ranks)).max() > 0.01
    assert_close(soft_sort(scores).sum(-1), scores.sum(-1))
    top = soft_top_k(scores, 3)
    assert_close(top.mask.sum(-1), jnp.full(2, 3.0))
    low, high = soft_quantile(scores, jnp.array([0.2, 0.8]))
    assert (low < high).all()
    for result in (hl.soft_rank, hl.soft_sort):
        assert jax.eval_shape(result, scores.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_one_item_has_rank_0():
    assert_equal(hl.soft_argsort(jnp.ones((2, 1))).ranks(), jnp.zeros((2, 1)))
    assert_equal(hl.soft_rank(jnp.ones(1)), jnp.zeros(1))


def test_top_k_of_short_sets_fills_up():
    _, scores = example(5, (3,))
    lengths = jnp.array([0, 2, 5], jnp.int32)
    top = THIN[2](scores, 3, lengths=lengths)
    assert_close(top.mask.sum(-1), jnp.array([0.0, 2.0, 3.0]))
    assert_equal(np.isinf(top.values), np.arange(3) >= np.array(lengths)[:, None])
    assert_equal(top.indices == 5, np.arange(3) >= np.array(lengths)[:, None])
    assert_equal(top.indices[1, :2], np.argsort(-np.asarray(scores[1, :2])))


X, SCORES = example(4)
call = functools.partial(hl.soft_quicksort, KEY, num_samples=1, certainty=1.0)
ERRORS = {
    "x: got int32, want a floating": lambda: call(X.astype(jnp.int32), SCORES),
    r"x: got shape \(4,\), want \[\*B, s, d\]": lambda: call(X[0, :, 0], SCORES),
    "scores: got int32, want a floating": lambda: call(X, SCORES.astype(jnp.int32)),
    r"scores: got shape \(\), want \[\*B, s\]": lambda: call(X, SCORES[0, 0]),
    r"scores: got shape \(2, 3\), want one for each item": lambda: call(X, SCORES[:, 1:]),
    r"scores: got shape \(2, 0\), want": lambda: call(X[:, :0], SCORES[:, :0]),
    "num_samples: got -1, want an int >= 0": lambda: call(X, SCORES, num_samples=-1),
    "num_samples: got 0.5, want": lambda: call(X, SCORES, num_samples=0.5),
    "certainty: got 0, want > 0": lambda: call(X, SCORES, certainty=0),
    "certainty: got nan, want > 0": lambda: call(X, SCORES, certainty=float("nan")),
    'proposal: got \'global\', want "local" or "uniform"': lambda: call(
        X, SCORES, proposal="global"
    ),
    "key: got None, want a PRNG key": lambda: hl.soft_quicksort(
        None, X, SCORES, num_samples=1, certainty=1.0, proposal="uniform"
    ),
    r"lengths: got float32\[2\], want int32\[2\]": lambda: call(X, SCORES, lengths=jnp.ones(2)),
    r"lengths: got int32\[3\], want int32\[2\]": lambda: call(
        X, SCORES, lengths=jnp.ones(3, jnp.int32)
    ),
    "k: got 5, want 1 to 4": lambda: hl.soft_top_k(SCORES, 5),
    "k: got 0, want 1 to 4": lambda: hl.soft_top_k(SCORES, 0),
    "q: got 1.5, want numbers in": lambda: hl.soft_quantile(SCORES, 1.5),
    "size: got 2.5, want an int": lambda: hl.bucket_starts(2.5),
    "size: got 0, want at least one": lambda: hl.bucket_starts(0),
}


@pytest.mark.parametrize("message", ERRORS)
def test_wrong_input_names_the_argument(message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(ERRORS[message])


def test_infinite_scores_sort_first_and_last():
    scores = jnp.array([jnp.inf, 1.0, -jnp.inf, 0.0])
    items = jnp.arange(4.0)[:, None]

    @jax.jit
    def run(scores, certainty):
        out = hl.soft_quicksort(None, items, scores, num_samples=2, certainty=certainty)
        return out.items[-1][:, 0], out.scores[-1]

    (places, ordered), vjp = jax.vjp(run, scores, 50.0)
    np.testing.assert_allclose(places, [2, 3, 1, 0], atol=1e-4)
    assert np.isfinite(ordered).all() and (np.diff(ordered) > 0).all()
    assert all(np.isfinite(x).all() for x in vjp((jnp.ones(4), jnp.ones(4))))
