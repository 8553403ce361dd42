"""A batch sharded over a mesh of explicit axes, the default of `jax.make_mesh`, changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from laws import assert_close, assert_equal, random_tuples

import hyperlayer_jax as hl
from hyperlayer_jax import nn
from hyperlayer_jax.nn import patterns

SPLIT = PartitionSpec("data")
ATTENTION = {
    "learned": "learned",
    "learned2d": "learned2d",
    "strided": patterns.Strided(stride=4),
    "window": patterns.Window(window=4),
    "block": patterns.Block(block=4),
    "content": patterns.Content(num_lines=2, num_nearest=2, window=3),
}
MODULES = {
    "rows": lambda rngs: nn.SparseLinear(6, 5, 3, by_output=True, values=1.0, rngs=rngs),
    "entries": lambda rngs: nn.SparseLinear(6, 5, 1, values=1.0, rngs=rngs),
    "jumping rows": lambda rngs: nn.SparseLinear(6, 5, 3, by_output=True, rngs=rngs),
    "jumping entries": lambda rngs: nn.SparseLinear(6, 5, 1, rngs=rngs),
    **{
        name: lambda rngs, pattern=pattern: nn.SparseSelfAttention(
            6, 3, 16, num_kv_heads=1, pattern=pattern, rotary=False, rngs=rngs
        )
        for name, pattern in ATTENTION.items()
    },
    "glimpses": lambda rngs: nn.GlimpseAttention(
        6, (3, 3), 1, sampler=nn.Sampler(num_global=1, num_local=0, rngs=rngs), rngs=rngs
    ),
    "finding": lambda rngs: nn.FindingGlimpses(
        (3, 3), 2, num_anywhere=1, sigma_scale=1.0, rngs=rngs
    ),
    "sort": lambda rngs: nn.SoftQuicksort(num_samples=2, certainty=3.0, rngs=rngs),
}


def mesh():
    return jax.make_mesh((4,), ("data",), (AxisType.Explicit,), devices=jax.devices("cpu")[:4])


def sharded(tree):
    return jax.device_put(tree, SPLIT)


@pytest.mark.parametrize("name", MODULES)
def test_modules_learn_the_same(name):
    graph, state = nnx.split(MODULES[name](nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), (8, 14, 6))

    def loss(state, x):
        module = nnx.merge(graph, state)
        if name == "glimpses":
            return (module(x[..., None], x[:, 0]).patches ** 2).mean()
        if name == "finding":
            seen = module(x[..., None], x[:, None, :12, :4])
            return (nn.average(seen, seen.patches.reshape(8, 2, 9)) ** 2).mean()
        if name == "sort":
            return (module(x, x[..., 0]).items[-1] ** 2 * x).mean()
        return (module(x[:, 0] if name.endswith(("rows", "entries")) else x) ** 2).mean()

    run = jax.jit(jax.value_and_grad(loss, (0, 1), allow_int=True))
    value, (of_state, of_x) = run(state, x)
    with jax.set_mesh(mesh()):
        got_value, (got_of_state, got_of_x) = run(state, sharded(x))
    assert jax.typeof(got_of_x).sharding.spec[0] == "data"
    wanted = jax.tree.leaves((value, of_state, of_x))
    for want, got in zip(wanted, jax.tree.leaves((got_value, got_of_state, got_of_x)), strict=True):
        if want.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(got, want, 1e-5, 1e-6)


def test_the_same_key_draws_the_same_points():
    tuples = random_tuples((8,), 3, 2)
    draw = jax.jit(lambda t: hl.discretize(jax.random.key(0), t, (9, 9), num_global=2))
    want = draw(tuples)
    with jax.set_mesh(mesh()):
        indices, values = draw(sharded(tuples))
    assert_equal(indices, want[0])
    assert_close(values, want[1])


def test_ranks_and_the_largest():
    scores = jax.random.normal(jax.random.key(0), (8, 5))

    @jax.jit
    def functions(scores):
        return hl.soft_rank(scores), hl.soft_top_k(scores, 2), hl.soft_quantile(scores, 0.5)

    want = functions(scores)
    with jax.set_mesh(mesh()):
        assert_close(functions(sharded(scores)), want)


def test_sparse_tensors_of_entries():
    rng = np.random.default_rng(0)
    tensor = hl.SparseTensor(
        jnp.asarray(rng.integers(-1, 6, (8, 9, 3)), jnp.int32), jnp.ones((8, 9)), (5, 2), (6,)
    )
    x = jnp.asarray(rng.normal(size=(8, 6, 2)), jnp.float32)

    @jax.jit
    def functions(tensor, x):
        softmax = hl.sparse_softmax(tensor)
        return hl.contract(softmax, x), hl.todense(softmax), hl.todense(hl.transpose(tensor))

    want = functions(tensor, x)
    with jax.set_mesh(mesh()):
        got = functions(sharded(tensor), sharded(x))
    assert [jax.typeof(y).sharding.spec[0] for y in got] == ["data"] * 3
    assert_close(got, want)
