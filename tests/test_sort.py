"""Laws of the differentiable quicksort."""

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
SIZES = (2, 5)
STATIC = ("num_samples", "proposal")
sort = jax.jit(hl.soft_quicksort, static_argnames=(*STATIC, "certainty"))


@functools.partial(jax.jit, static_argnames=(*STATIC, "certainty"))
def gradients(key, x, scores, **options):
    """Of a weighted sum of all levels."""

    def loss(x, scores):
        levels = hl.soft_quicksort(key, x, scores, **options)
        flat = [a.reshape(-1).astype(jnp.float32) for a in (*levels.items, *levels.scores)]
        flat = jnp.concatenate(flat)
        return (flat * jnp.cos(jnp.arange(flat.size, dtype=jnp.float32))).sum()

    return jax.grad(loss, (0, 1))(x, scores)


def example(s, batch=(2,), dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(*batch, s, 3)), dtype)
    return x, jnp.asarray(rng.normal(size=(*batch, s)), dtype)


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


@pytest.mark.parametrize("kind", ["random", "ties", "equal", "extreme", "signed zeros"])
@pytest.mark.parametrize("s", [1, 2, 3, 6, 9])
def test_without_samples_it_is_the_exact_stable_sort(s, kind):
    scores = jnp.asarray(scores_of(kind, s), jnp.float32)
    x = jnp.broadcast_to(jnp.arange(s, dtype=jnp.float32)[:, None], (2, s, 1))
    levels = sort(KEY, x, scores, num_samples=0, certainty=1.0)
    order = np.argsort(np.asarray(scores), axis=-1, kind="stable")
    assert_equal(levels.items[-1][..., 0], order.astype(np.float32))
    assert_equal(levels.scores[-1], np.take_along_axis(np.asarray(scores), order, -1))


@pytest.mark.slow
@pytest.mark.parametrize("s", [1, 4, 7, 8, 17, 33])
def test_any_size_is_sorted(s):
    test_without_samples_it_is_the_exact_stable_sort(s, "ties")
    x, scores = example(s)
    levels = sort(KEY, x, scores, num_samples=3, certainty=2.0)
    assert len(levels.items) == 1 + int(np.ceil(np.log2(s)))
    assert_finite(levels)


@pytest.mark.parametrize("s", range(1, 70))
def test_buckets_halve_until_they_hold_one_item(s):
    levels = hl.bucket_starts(s)
    assert len(levels) == 1 + int(np.ceil(np.log2(s)))
    assert levels[0].tolist() == [0] and levels[-1].tolist() == list(range(s))
    for starts, following in itertools.pairwise(levels):
        for start, stop in zip(starts, [*starts[1:], s], strict=True):
            inside = following[(following >= start) & (following < stop)]
            want = [start] if stop - start == 1 else [start, start + (stop - start) // 2]
            assert inside.tolist() == want


@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("s", SIZES)
@given(data=st.data())
def test_permutations_are_doubly_stochastic_and_keep_to_their_buckets(s, proposal, data):
    scores = data.draw(floats(-3, 3, (2, s)))
    key = jax.random.key(data.draw(st.integers(0, 2**32 - 1)))
    x, _ = example(s)
    levels = sort(key, x, scores, num_samples=4, certainty=2.0, proposal=proposal)
    starts = hl.bucket_starts(s)
    assert len(levels.permutations) == len(starts) - 1
    bucket_of = [np.searchsorted(start, np.arange(s), side="right") for start in starts]
    for t, permutation in enumerate(levels.permutations):
        dense = np.asarray(hl.todense(permutation))
        assert (dense >= 0).all()
        np.testing.assert_allclose(dense.sum(-1), 1, 1e-5)
        np.testing.assert_allclose(dense.sum(-2), 1, 1e-5)
        mixes = bucket_of[t][:, None] != bucket_of[t][None]
        assert (np.where(mixes, dense, 0) == 0).all()
        assert_close(levels.items[t + 1], dense @ np.asarray(levels.items[t], np.float64))
        assert_close(
            levels.scores[t + 1], (dense @ np.asarray(levels.scores[t])[..., None])[..., 0]
        )


@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("s", [2, 3, 5])
def test_candidates_have_the_weights_of_the_paper(s, proposal):
    """All splits are candidates after enough draws; each weighs its probability (section 3.3)."""
    x, scores = example(s, ())
    levels = sort(KEY, x, scores, num_samples=400, certainty=0.7, proposal=proposal)
    upper = [set(c) for c in itertools.combinations(range(s), s - s // 2)]
    want = oracle.soft_split(np.asarray(scores, np.float64), upper, 0.7)
    assert_close(hl.todense(levels.permutations[0]), want)


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_every_bucket_is_a_chunk_of_its_own(proposal):
    """The second step splits both halves as it would split each of them alone."""
    x, scores = example(6, ())
    levels = sort(KEY, x, scores, num_samples=400, certainty=0.7, proposal=proposal)
    got = np.asarray(hl.todense(levels.permutations[1]))
    for half in (slice(0, 3), slice(3, 6)):
        bucket = np.asarray(levels.scores[1][half], np.float64)
        want = oracle.soft_split(bucket, map(set, itertools.combinations(range(3), 2)), 0.7)
        np.testing.assert_allclose(got[half, half], want, 1e-4, 1e-5)


def drawn(proposal, scores, certainty, n=4000):
    """How often each item is in the upper half of the first sampled candidate."""
    keys = jax.random.split(KEY, n)
    s = scores.shape[-1]

    def second_candidate(key):
        options = {"num_samples": 1, "certainty": certainty, "proposal": proposal}
        levels = hl.soft_quicksort(key, jnp.zeros((s, 1)), scores, **options)
        return levels.permutations[0].indices[s // 2 :, 1, 0]

    upper = np.asarray(jax.jit(jax.vmap(second_candidate))(keys))
    return np.bincount(upper.reshape(-1), minlength=s) / n


def test_uniform_candidates_ignore_the_scores():
    frequency = drawn("uniform", jnp.array([0.0, 1.0, 2.0, 30.0]), 5.0)
    np.testing.assert_allclose(frequency, 0.5, atol=0.04)


def test_local_candidates_lie_near_the_split_by_score():
    frequency = drawn("local", jnp.array([0.0, 1.9, 2.1, 9.0]), 1.0)
    assert (np.diff(frequency) > 0).all() and frequency[0] < 0.2 and frequency[3] > 0.9
    sure = drawn("local", jnp.array([0.0, 1.0, 3.0, 9.0]), 50.0)
    np.testing.assert_allclose(sure, [0, 0, 1, 1])


@pytest.mark.slow
@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("s", [5])
def test_certainty_makes_it_exact(s, proposal):
    x, _ = example(s)
    scores = jnp.asarray(np.random.default_rng(0).permuted(np.tile(np.arange(s), (2, 1)), axis=-1))
    scores = scores.astype(jnp.float32)
    exact = sort(KEY, x, scores, num_samples=0, certainty=1.0)
    distance = [
        np.abs(sort(KEY, x, scores, num_samples=8, certainty=c, proposal=proposal).scores[-1]
               - exact.scores[-1]).max()
        for c in (0.01, 1.0, 1000.0)
    ]  # fmt: skip
    assert distance[0] > distance[2] and distance[2] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["random", "ties", "equal", "huge", "far apart"])
def test_is_finite_whatever_the_scores(kind, dtype, proposal):
    s = 5
    x, _ = example(s, dtype=dtype)
    scores = jnp.asarray(scores_of(kind, s), dtype)
    options = {"num_samples": 4, "certainty": 1e4, "proposal": proposal}
    levels = sort(KEY, x, scores, **options)
    assert all(a.dtype == dtype for a in (*levels.items, *levels.scores))
    assert_finite((levels, gradients(KEY, x, scores, **options)))


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_gradients_reach_every_item_and_score(proposal):
    x, scores = example(7)
    got = gradients(KEY, x, scores, num_samples=8, certainty=1.0, proposal=proposal)
    assert all((np.asarray(g) != 0).all() for g in got)


@pytest.mark.slow
@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("s", [5])
def test_gradients_match_finite_differences(s, proposal):
    with jax.enable_x64(True):
        x, scores = example(s, dtype=jnp.float64)

        # A score moves the local candidates' noise too, which is not differentiated: enough of them
        # enumerate all splits, so that small changes of the scores draw the same set.
        @jax.jit
        def levels(x, scores):
            options = {"num_samples": 300, "certainty": 0.5, "proposal": proposal}
            result = hl.soft_quicksort(KEY, x, scores, **options)
            return result.items, result.scores

        check_grads(levels, (x, scores), 1, ["rev"], 1e-5, 1e-5)


def test_targets_travel_back_through_the_transposes():
    """Without samples, the transposes undo the sort."""
    x, scores = example(7)
    levels = sort(KEY, x, scores, num_samples=0, certainty=1.0)
    target = levels.items[-1]
    for t in reversed(range(len(levels.permutations))):
        target = hl.contract(hl.transpose(levels.permutations[t]), target)
        assert_close(target, levels.items[t])


@pytest.mark.parametrize("s", [4, 5])
def test_only_the_order_and_the_gaps_of_scores_matter(s):
    """Scores and certainty come as a product of differences."""
    x, scores = example(s)
    levels = sort(KEY, x, scores, num_samples=4, certainty=2.0)
    assert_close(
        sort(KEY, x, scores + 8, num_samples=4, certainty=2.0).items, levels.items, 1e-4, 1e-4
    )
    assert_close(sort(KEY, x, 4 * scores, num_samples=4, certainty=0.5).items, levels.items)


@pytest.mark.slow
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_sharding_the_batch_changes_nothing(proposal):
    x, scores = example(5, (16,))
    options = {"num_samples": 4, "certainty": 2.0, "proposal": proposal}
    sharded = jax.device_put((x, scores), NamedSharding(batch_mesh(), PartitionSpec("data")))
    got = sort(KEY, *sharded, **options)
    want = sort(KEY, x, scores, **options)
    assert_equal([p.indices for p in got.permutations], [p.indices for p in want.permutations])
    assert_close(got.items, want.items)
    got = gradients(KEY, *sharded, **options)
    assert_close(got, gradients(KEY, x, scores, **options))


@pytest.mark.slow
def test_works_inside_shard_map_and_vmap():
    x, scores = example(9, (8,))
    keys = jax.random.split(KEY, 8)
    spec = PartitionSpec("data")

    def each(key, x, scores):
        options = {"num_samples": 33, "certainty": 2.0}
        loss = lambda scores: (hl.soft_quicksort(key, x, scores, **options).items[-1] ** 2).sum()  # noqa: E731
        return jax.grad(loss)(scores)

    mapped = jax.vmap(each)
    sharded = jax.shard_map(mapped, mesh=batch_mesh(), in_specs=spec, out_specs=spec)
    got, want = jax.jit(sharded)(keys, x, scores), jax.jit(mapped)(keys, x, scores)
    assert_close(got, want, 1e-4, 1e-4)


@pytest.mark.parametrize("batch", [(), (0,), (2, 3)])
def test_any_leading_axes(batch):
    x, scores = example(5, batch)
    levels = sort(KEY, x, scores, num_samples=2, certainty=1.0)
    assert all(a.shape == x.shape for a in levels.items)
    assert all(a.shape == scores.shape for a in levels.scores)
    assert [p.values.shape for p in levels.permutations] == [(*batch, 5, 3)] * 3


def test_the_program_does_not_grow_with_samples_nor_memory_beyond_them():
    x, scores = example(64, ())
    run = lambda c: functools.partial(gradients, num_samples=c, certainty=1.0)  # noqa: E731
    arguments = (KEY, x, scores)
    assert len(program(run(40), *arguments)) == len(program(run(100), *arguments))
    assert largest_array(run(100), *arguments) <= 101 * 64 * 64


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
}


@pytest.mark.parametrize("message", ERRORS)
def test_wrong_input_names_the_argument(message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(ERRORS[message])
