"""The launcher of sparse classifiers: few steps, its files, and the masks that rivals keep."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("tensorboardX", reason="launchers need the extra train")

from train import masks, sparse
from train.runs import load_run

SMALL = {"steps": 4, "hidden": "20", "batch_size": 4}


@pytest.mark.parametrize("method", ["learned", "random", "rigl"])
def test_trains_evaluates_and_leaves_its_files(tmp_path, method):
    options = {"seeds": 2} if method == "random" else {"every": 2}
    config = sparse.Config(**SMALL, method=method, **options)
    result = sparse.train_and_evaluate(config, tmp_path)
    assert result["steps"] == 4 and result["test_examples"] == 359
    assert len(result["accuracies"]) == config.seeds
    assert result["accuracy"] == pytest.approx(np.mean(result["accuracies"]))
    # One weight for each hidden unit and each class; few of them may be exactly 0.
    assert 25 / (64 * 20 + 20 * 10) < result["density"] <= 30 / (64 * 20 + 20 * 10)
    for seed in range(config.seeds):
        folder = tmp_path / f"seed{seed}" if seed else tmp_path
        assert (folder / "weights.png").read_bytes().startswith(b"\x89PNG")
        _, found = load_run(folder)
        assert found == (dataclasses.replace(config, seed=seed, seeds=1) if seed else config)
    if config.seeds > 1:
        # Each is a run like any other.
        alone = sparse.train_and_evaluate(dataclasses.replace(found, mode="eval"), folder)
        assert alone["accuracies"] == result["accuracies"][-1:]
        again = sparse.train_and_evaluate(config, tmp_path)
        assert again == result


@pytest.mark.parametrize("method", ["set", "rigl", "magnitude"])
def test_masks_keep_their_number_and_what_comes_starts_at_0(method):
    keys = jax.random.split(jax.random.key(0), 2)
    existing = jax.random.permutation(keys[0], 200).reshape(20, 10) < 40
    weights = jax.random.normal(keys[1], (20, 10))
    params = {"kernel": weights, "bias": jnp.ones(10)}
    if method != "magnitude":
        params["kernel"] = jnp.where(existing, weights, 0)
    options = {"until": 8, "every": 2, "fraction": 0.5}
    optimizer = masks.masked(keys[0], optax.adam(0.1), method, {(20, 10): 40}, **options)
    state = optimizer.init(params)
    # The largest gradients are in the last row.
    gradient = {"kernel": jnp.ones((20, 10)).at[19].set(2), "bias": jnp.ones(10)}

    @jax.jit
    def update(params, state):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    counts, came = [], []
    for _ in range(10):
        before = params["kernel"] != 0
        with jax.numpy_dtype_promotion("standard"):
            params, state = update(params, state)
        mask = np.asarray(state.masks["kernel"], bool)
        counts.append(mask.sum())
        assert not np.asarray(params["kernel"])[~mask].any()
        assert not np.asarray(state.inner[0].mu["kernel"])[~mask].any()
        came.append(mask & ~np.asarray(before))
    assert (np.asarray(params["bias"]) != 1).all()
    assert counts[-1] == 40
    if method == "magnitude":
        assert counts == sorted(counts, reverse=True) and counts[0] == 200
        return
    assert set(counts) == {40}
    assert came[2].any() and not came[1].any()
    if method == "rigl":
        assert came[2][19].sum() == 10 - np.asarray(existing)[19].sum()


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"density": 0.0}, "--density"),
        ({"density": 1.5}, "--density"),
        ({"hidden": "30,x"}, "--hidden"),
        ({"until": 2.0}, "--until"),
        ({"seeds": 0}, "--seeds"),
        ({"seed": 2**32 - 1, "seeds": 2}, "--seeds"),
        ({"method": "dense", "density": 0.1}, "--density has no effect"),
        ({"method": "magnitude", "fraction": 0.1}, "--fraction has no effect"),
        ({"method": "random", "every": 2, "until": 0.5}, "--every .* --until has no effect"),
    ],
)
def test_a_wrong_value_names_its_flag(options, flag):
    with pytest.raises(ValueError, match=flag):
        sparse.Config(**options)


@pytest.mark.parametrize("density", [0.02, 0.1, 0.6, 1.0])
def test_small_layers_are_denser_and_all_together_as_dense_as_asked_for(density):
    config = sparse.Config(density=density, distribution="erdos_renyi", hidden="300,100")
    inputs, outputs = np.array([784, 300, 100]), np.array([300, 100, 10])
    each = np.array(config.num_weights(784))
    sizes = inputs * outputs
    assert abs(each @ outputs - density * sizes.sum()) <= outputs.sum() / 2
    assert (each <= inputs).all()
    free = each < inputs
    scale = (each / (1 + inputs / outputs))[free]
    np.testing.assert_allclose(scale, scale.mean() if free.any() else scale, rtol=0.05)


def test_no_line_falls_in_a_look():
    config = sparse.Config(every=100, steps=400)
    assert [step for step in range(401) if not sparse.is_settled(config, step)] == [50, 150, 250]
    assert sparse.is_settled(sparse.Config(every=100, steps=400, method="rigl"), 50)
    with pytest.raises(ValueError, match="--every must be at least 2 with --method=learned"):
        sparse.Config(every=1)
