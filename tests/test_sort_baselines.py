"""What our sort is compared with sorts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("tensorboardX", reason="benchmarks need the extra train")

from benchmarks import sort
from benchmarks.sort import permutation_loss
from benchmarks.sort_baselines import BASELINES, bitonic
from hyperlayer_jax import soft_quicksort
from train import data

SCORES = jnp.asarray(np.random.default_rng(0).permutation(8) / 2 - 1.7, jnp.float32)[None]


@pytest.mark.parametrize("name", [n for n in BASELINES if n != "ott-jax"])
def test_a_baseline_is_row_stochastic_and_sorts_when_cold(name):
    relax, temperature = BASELINES[name]
    matrix = jax.jit(relax)
    scores = SCORES[0]
    soft, cold = matrix(scores, temperature), matrix(scores, 1e-3)
    np.testing.assert_allclose(soft.sum(-1), 1, atol=1e-5)
    order = np.argsort(np.asarray(scores))
    exact = np.asarray(jax.nn.one_hot(order, 8))
    # Transport goes on towards a permutation for as long as it is balanced.
    np.testing.assert_allclose(cold, exact, atol=0.3 if name == "Sinkhorn" else 0.01)
    assert permutation_loss([cold], jnp.asarray(exact)) < permutation_loss([soft], exact)


def test_a_bitonic_network_wants_a_power_of_two():
    with pytest.raises(ValueError, match="size: got 6, want a power of two"):
        list(bitonic(6))


def test_our_permutation_has_no_loss_where_it_is_exact_and_much_where_it_is_wrong():
    eye = jnp.eye(8)[None]
    exact = jax.nn.one_hot(jnp.argsort(SCORES), 8)
    run = jax.jit(functools.partial(soft_quicksort, None, num_samples=8, certainty=100.0))
    right, wrong = run(eye, SCORES), run(eye, -SCORES)
    assert permutation_loss(list(right.items[1:]), exact) < 1e-3
    assert permutation_loss(list(wrong.items[1:]), exact) > 5


def test_methods_train_in_turns_and_are_tested():
    protocol = sort.Protocol("digits", 1, (1, 1), (4,), 2, (3,), 1, 10)
    branches = [("ours", "permutation"), ("ours, all levels", "images"), ("SoftSort", "images")]
    task = sort.Task(protocol, data.load("digits"), 3, branches, 1e-3)
    case = {"size": 3, "seed": 0, "factors": [1.0]}
    cases = [case | {"method": method, "supervision": from_} for method, from_ in branches]
    results = list(sort.train(task, cases, 51))
    assert [r["step"] for r in results] == [50, 50, 50, 51, 51, 51]
    assert all(0 <= r["exact_match"] <= r["element_wise"] <= 1 for r in results)
    assert len(sort.chosen(results)) == 3
