"""Sequences divided over devices: what they learn, and where they look, is as on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("tensorboardX", reason="launchers need the extra train")

from train import devices, language
from train.config import FlagError
from train.transformer_config import Config, make_model

# Of each of the layers that go their own ways with keys.
CONFIG = {"layers": "lw", "features": 8, "num_heads": 2, "length": 16, "batch_size": 4}


def test_sequences_over_devices_are_as_on_one():
    """The loss, its gradients, and, bit by bit, the points; keys are gathered, scores never."""
    config = Config(**CONFIG, num_tuples=1, num_global=1, num_local=0, window=4)
    graphdef, params, rest = nnx.split(make_model(config), nnx.Param, ...)
    tokens = jax.random.randint(jax.random.key(0), (4, 17), 0, 256)

    @jax.jit
    def run(params, tokens):
        def loss(params):
            model = nnx.merge(graphdef, params, rest, copy=True)
            points = model.patterns(tokens[:, :-1])[0].indices
            return language.token_losses(model, tokens).mean(), points

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, points), gradients = run(params, tokens)
    mesh = devices.make_mesh({"data": 2, "seq": 2}, config.batch_size)
    state = devices.place(mesh, (params, tokens))
    with devices.use(mesh):
        compiled = run.lower(*state).compile()
    (divided_loss, divided_points), divided = compiled(*state)
    np.testing.assert_array_equal(divided_points, points)
    np.testing.assert_allclose(divided_loss, loss, rtol=1e-5)
    for got, want in zip(jax.tree.leaves(divided), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-6)
    assert " all-gather(" in compiled.as_text()


def test_a_mesh_that_cannot_divide_sequences_is_refused():
    with pytest.raises(ValueError, match="--length must be divided by seq:3 of --mesh, got 16"):
        Config(**CONFIG, mesh="data:2,seq:3")
    with pytest.raises(FlagError, match="want 16 devices, have 8"):
        devices.make_mesh({"data": 4, "seq": 4}, 4)
    tree = jnp.ones((2, 4))
    assert devices.shard_sequences(tree) is tree and devices.gather_sequences(tree) is tree
