"""Laws of the Flax modules: the functions with parameters and random streams, nothing else."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from laws import FLOATS, assert_close, assert_equal, call, random_tuples

import hyperlayer_jax as hl
from hyperlayer_jax import nn
from hyperlayer_jax.nn.inputs import SparseInputs
from hyperlayer_jax.nn.linear import TokenLinear

OUT, IN = (3, 2), (4,)
POINTS = {"num_global": 2, "num_local": 2, "region": 2}
TEMPLATE = jnp.array([[0, 0, 0], [2, 1, 3]], jnp.int32)
# Kind of template: arguments of the layer, chunk axes, learned columns, the space that they index.
KINDS = {
    "none": ({}, (2,), (0, 1, 2)),
    "output": ({"by_output": True}, (6,), (2,)),
    "array": ({"template": TEMPLATE, "columns": (1, 2)}, (2,), (1, 2)),
}


class Hypernetwork(nnx.Module):
    """Index tuples [*B, *chunks, 3, r] from x [*B, 4, *D], through free parameters."""

    def __init__(self, chunks, space):
        base = random_tuples(chunks, 3, len(space), high=min(space) - 1)
        self.means, self.values = nnx.Param(base.means), nnx.Param(base.values)
        self.sigmas = nnx.Param(base.sigmas)
        self.num_feature_axes = 0

    def __call__(self, x):
        last = x.ndim - self.num_feature_axes
        scale = jnp.tanh(x.sum(range(last - 1, x.ndim))).astype(jnp.float32)
        batch = scale.shape
        put = lambda a: jnp.broadcast_to(a[...], (*batch, *a.shape))  # noqa: E731
        scale = scale.reshape(*batch, *(1,) * self.values.ndim)
        values = put(self.values) * jnp.broadcast_to(scale, (*batch, *self.values.shape))
        return hl.IndexTuples(put(self.means), put(self.sigmas), values)


def sampler(**options):
    return nn.Sampler(**({"evaluation": "round", "rngs": nnx.Rngs(0, sample=7)} | POINTS | options))


def build(kind, features=0, **options):
    arguments, chunks, columns = KINDS[kind]
    space = tuple((OUT + IN)[c] for c in columns)
    hypernetwork = Hypernetwork(chunks, space)
    hypernetwork.num_feature_axes = features
    layer = nn.HyperLayer(
        hypernetwork,
        IN,
        OUT,
        num_feature_axes=features,
        **(arguments | {"sampler": sampler(), "rngs": nnx.Rngs(0)} | options),
    )
    return layer, space


def example(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


def composed(kind, tuples, points, x):
    """W from points, and its product with x, by the functional API alone."""
    indices, values = points
    batch = x.shape[: values.ndim - len(KINDS[kind][1]) - 1]
    if kind == "output":
        return hl.contract(hl.RowSparseTensor(indices, values, OUT, IN), x)
    if kind == "array":
        template = jnp.broadcast_to(TEMPLATE, (*batch, *TEMPLATE.shape))
        indices = hl.apply_template(template, indices, columns=(1, 2))
    indices = indices.reshape(*batch, -1, 3)
    tensor = hl.SparseTensor(indices, values.reshape(*batch, -1), OUT, IN)
    return hl.contract(tensor, x)


@pytest.mark.parametrize(("shape", "features"), [((4,), 0), ((2, 4), 0), ((2, 4, 5), 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_hyperlayer_is_the_composition_of_the_functions(kind, shape, features):
    layer, space = build(kind, features)
    x = example(*shape)
    tuples = call(layer.hypernetwork, x)
    key = nnx.clone(layer).sampler.rngs()
    y = call(layer, x)
    in_training = jax.jit(functools.partial(hl.discretize, shape=space, **POINTS))(key, tuples)
    by_hand = jax.jit(functools.partial(composed, kind))
    want = by_hand(tuples, in_training, x)
    assert y.shape == (*shape[: x.ndim - 1 - features], *OUT, *shape[x.ndim - features :])
    assert_close(y, want)
    evaluation = nnx.view(layer, deterministic=True)
    assert_close(call(evaluation, x), by_hand(tuples, hl.round_tuples(tuples, space), x))


@pytest.mark.parametrize("kind", KINDS)
def test_every_call_draws_anew_and_evaluation_does_not(kind):
    layer, _ = build(kind)
    x = example(2, 4)
    evaluation = nnx.view(layer, deterministic=True)
    assert_equal(call(evaluation, x), call(evaluation, x))
    assert layer.sampler.rngs.count[...] == 0 and not layer.sampler.deterministic
    first, second = call(layer, x), call(layer, x)
    assert layer.sampler.rngs.count[...] == 2
    assert (np.asarray(first) != np.asarray(second)).any()
    assert_equal(call(build(kind)[0], x), first)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_param(kind, dtype):
    layer, _ = build(kind, use_bias=True)
    x = example(2, 4, dtype=dtype)
    gradient = nnx.jit(nnx.grad(lambda layer, x: (layer(x) ** 2).mean().astype(jnp.float32)))(
        layer, x
    )
    paths = nnx.to_flat_state(gradient)
    assert len(paths) == 4
    for path, leaf in paths:
        numbers = np.asarray(leaf[...], np.float64)
        assert np.isfinite(numbers).all() and (numbers != 0).any(), path
    assert call(layer, x).dtype == dtype


def test_the_bias_is_added_to_every_output_and_feature():
    layer, _ = build("output", 1, use_bias=True, sampler=sampler(deterministic=True))
    x = example(2, 4, 5)
    plain = layer(x)
    layer.bias[...] = jnp.arange(6.0).reshape(OUT)
    assert_close(layer(x) - plain, np.broadcast_to(np.arange(6.0).reshape(*OUT, 1), (2, *OUT, 5)))


@pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 3, 4)])
@pytest.mark.parametrize("by_output", [False, True])
def test_a_sparse_linear_layer_serves_any_batch_with_one_matrix(by_output, shape):
    layer = nn.SparseLinear(
        4, OUT, 4, by_output=by_output, use_bias=True, sampler=sampler(), rngs=nnx.Rngs(0)
    )
    layer.bias[...] = jnp.arange(6.0).reshape(OUT)
    x = example(*shape)
    dense = nnx.jit(lambda layer: hl.todense(layer.weight()))
    weights = np.asarray(dense(nnx.clone(layer)), np.float64)
    y = call(layer, x)
    want = np.einsum("oai,...i->...oa", weights, x) + np.arange(6.0).reshape(OUT)
    assert_close(y, want)


def test_all_inputs_of_fixed_values_are_a_sum():
    layer = nn.SparseLinear(4, 3, 4, by_output=True, values=1.0, rngs=nnx.Rngs(0))
    layer = nnx.view(layer, deterministic=True)
    means = jnp.log(jnp.array([1e-6, 1 / 3, 2 / 3, 1 - 1e-6]))
    means = means - jnp.log1p(-jnp.exp(means))
    layer.tuples.means[...] = jnp.broadcast_to(means[:, None], (3, 4, 1))
    x = example(5, 4)
    assert_close(layer(x), np.repeat(np.asarray(x.sum(-1, keepdims=True)), 3, -1))


@pytest.mark.parametrize("values", [None, 1.0])
def test_fixed_values_are_not_trained(values):
    layer = nn.SparseLinear(4, 3, 2, values=values, sampler=sampler(), rngs=nnx.Rngs(0))
    tuples = layer.tuples
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(tuples)))
    optimizer = nnx.Optimizer(layer, optax.sgd(0.1), wrt=nnx.Param)
    x = example(8, 4)
    gradient = nnx.jit(nnx.grad(lambda layer: ((layer(x) - x[:, :3]) ** 2).mean()))
    optimizer.update(layer, gradient(layer))
    changed = {
        name: bool((before[name] != np.asarray(getattr(tuples, name)[...])).any())
        for name in ("means", "sigmas", "values")
    }
    assert changed == {"means": True, "sigmas": True, "values": values is None}


def test_jit_of_flax_and_of_jax_agree_with_neither():
    kind, x = "output", example(2, 4)
    want_layer, _ = build(kind)
    want = want_layer(x), want_layer(x)
    layer, _ = build(kind)
    assert_close((call(layer, x), call(layer, x)), want)
    graph, state = nnx.split(build(kind)[0])

    @jax.jit
    def step(state, x):
        layer = nnx.merge(graph, state)
        y = layer(x)
        return y, nnx.state(layer)

    first, state = step(state, x)
    assert_close((first, step(state, x)[0]), want)


@pytest.mark.slow
def test_quicksort_is_the_function_and_evaluation_is_exact():
    x, scores = example(2, 5, 3), example(2, 5)
    options = {"num_samples": 4, "certainty": 2.0, "proposal": "uniform"}
    sort = nn.SoftQuicksort(rngs=nnx.Rngs(0), **options)
    key = nnx.clone(sort).rngs()
    by_hand = jax.jit(functools.partial(hl.soft_quicksort, **options))
    assert_close(call(sort, x, scores), by_hand(key, x, scores))
    assert sort.rngs.count[...] == 1
    evaluation = nnx.view(sort, deterministic=True)
    assert_equal(call(evaluation, x, scores).scores[-1], np.sort(np.asarray(scores), -1))
    assert sort.rngs.count[...] == 1


@pytest.mark.parametrize("values", [None, 1.0])
def test_a_ready_hypernetwork_sees_its_input_and_all_of_it_learns(values):
    rngs = nnx.Rngs(0)
    start = nn.FreeTuples((3,), 2, (6, 5), values=values, rngs=rngs)
    features = nnx.Sequential(nnx.LinearGeneral((6, 5), 8, axis=(-2, -1), rngs=rngs), nnx.relu)
    hypernetwork = nn.AdaptiveTuples(features, 8, start, rngs=rngs)
    layer = nn.HyperLayer(hypernetwork, (6, 5), 3, by_output=True, rngs=rngs)
    x = example(2, 6, 5)
    tuples = call(hypernetwork, x)
    assert tuples.means.shape == (2, 3, 2, 2) and tuples.values.shape == (2, 3, 2)
    assert (np.asarray(tuples.means[0]) != np.asarray(tuples.means[1])).any()
    assert (np.asarray(tuples.values) == 1).all() == (values is not None)
    assert_close(jax.tree.map(lambda a: a[0], tuples), call(hypernetwork, x[0]))
    gradient = nnx.jit(nnx.grad(lambda layer, x: (layer(x) ** 2).mean()))(layer, x)
    for path, leaf in nnx.to_flat_state(gradient):
        assert np.asarray(leaf[...]).any(), path


@pytest.mark.parametrize("by_output", [False, True])
@pytest.mark.parametrize("looks", [0.0, 0.75])
def test_sparse_inputs_are_dense_ones_written_out(by_output, looks):
    """Outputs and gradients, of repeated and absent entries, too; so is what a look finds."""
    layer = nn.SparseLinear((4, 5), 3, 6, by_output=by_output, use_bias=True, rngs=nnx.Rngs(0))
    layer.tuples.looks[...] = jnp.full_like(layer.tuples.looks[...], looks)
    indices = jax.random.randint(jax.random.key(0), (8, 9, 2), -1, 5)
    values, dy = (
        jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(8, 9), (2, 4, 3)])
    )
    dense = lambda values: hl.todense(hl.RowSparseTensor(indices, values, (2, 4), (4, 5)))  # noqa: E731
    sparse = lambda values: hl.RowSparseTensor(indices, values, (2, 4), (4, 5))  # noqa: E731

    def loss(of):
        return lambda layer, values: (layer(of(values)) * dy).sum()

    assert_close(call(layer, sparse(values)), call(layer, dense(values)))
    got, want = (
        nnx.jit(nnx.grad(loss(of), argnums=(0, 1)))(layer, values) for of in (sparse, dense)
    )
    assert_close(got[1], want[1])
    found, sizes = (np.asarray(got[0]["tuples"].pop(name)[...]) for name in ("jumped", "looks"))
    del want[0]["tuples"]["jumped"], want[0]["tuples"]["looks"]
    assert_close(jax.tree.leaves(got[0]), jax.tree.leaves(want[0]))
    there = sizes > 0
    assert there.any() == (looks > 0)
    rows = np.arange(3)[:, None, None] * np.ones_like(found[..., :1])
    places = np.concatenate([rows, found], -1)[..., :3] if by_output else found[..., :3]
    gradient = np.einsum("bco,bcij->oij", dy, np.asarray(dense(values)))
    places = np.moveaxis(places[there].astype(int), -1, 0)
    assert_close(sizes[there], np.abs(gradient[tuple(places)]))


def test_an_absent_entry_is_no_candidate():
    """By its number it would be some place, and what is there must not be read."""
    indices, nan = jnp.array([[[1], [4]], [[2], [-1]]], jnp.int32), float("nan")
    inputs = SparseInputs.of(
        hl.RowSparseTensor(indices, jnp.array([[1, nan], [2, nan]], jnp.float32), (2,), (4,))
    )
    which, rows = inputs.read(inputs.names(jnp.arange(4, dtype=jnp.int32)))
    assert_equal(rows[which], [[1, 0], [0, 2], [0, 0], [0, 0]])


def hyperlayer(rngs):
    start = nn.FreeTuples((3,), 2, (4,), rngs=rngs)
    tuples = nn.AdaptiveTuples(nnx.Linear(4, 5, rngs=rngs), 5, start, rngs=rngs)
    return nn.HyperLayer(tuples, 4, 3, by_output=True, rngs=rngs)


TOKENS, IMAGES = (2, 5, 4), [(2, 8, 8, 1), (2, 6)]
# What makes a module, and the shapes of its inputs.
MODULES = {
    "HyperLayer": (hyperlayer, [TOKENS]),
    "SparseLinear": (lambda rngs: nn.SparseLinear(4, 3, 2, rngs=rngs), [TOKENS]),
    "sampled": (lambda rngs: nn.SparseLinear(4, 3, 2, values=1.0, rngs=rngs), [TOKENS]),
    "SparseConv": (lambda rngs: nn.SparseConv(4, 3, 2, (3,), rngs=rngs), [TOKENS]),
    "SparseSelfAttention": (lambda rngs: nn.SparseSelfAttention(4, 2, 8, rngs=rngs), [TOKENS]),
    "TransformerLM": (
        lambda rngs: nn.TransformerLM(11, 4, 2, 8, layers="wl", rngs=rngs),
        [TOKENS[:2]],
    ),
    "GlimpseAttention": (lambda rngs: nn.GlimpseAttention(6, (4, 4), 1, rngs=rngs), IMAGES),
    "SpatialTransformer": (lambda rngs: nn.SpatialTransformer(6, (4, 4), 1, rngs=rngs), IMAGES),
    "ReinforceGlimpses": (lambda rngs: nn.ReinforceGlimpses(6, (4, 4), 1, rngs=rngs), IMAGES),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_table_of_every_module(name):
    """But for `SoftQuicksort`: Flax's tables fail on tuples of dataclasses."""
    make, shapes = MODULES[name]
    dtype = jnp.int32 if name == "TransformerLM" else jnp.float32
    model = make(nnx.Rngs(0))
    inputs = [jnp.ones(shape, dtype) for shape in shapes]
    assert type(model).__name__ in nnx.tabulate(model, *inputs)


def test_serves_as_a_module_of_linen():
    layer = nn.SparseLinear(4, 3, 2, rngs=nnx.Rngs(0))
    linen = nnx.bridge.to_linen(nn.SparseLinear, 4, 3, 2)
    x = example(2, 4)
    variables = linen.init(jax.random.key(0), x)
    assert linen.apply(variables, x).shape == layer(x).shape
    got = jax.grad(lambda v: (linen.apply(v, x) ** 2).sum(), allow_int=True)(variables)
    assert np.asarray(jax.tree.leaves(got["params"]["tuples"]["values"])[0]).any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["HyperLayer", "SparseLinear", "SoftQuicksort"])
def test_works_in_tree_mode(kind):
    build = {
        "HyperLayer": "nn.HyperLayer(tuples, 4, 3, by_output=True, rngs=rngs)",
        "SparseLinear": "nn.SparseLinear(4, 3, 2, values=1.0, use_bias=True, rngs=rngs)",
        "SoftQuicksort": "nn.SoftQuicksort(num_samples=2, certainty=1.0, rngs=rngs)",
    }[kind]
    arguments = "jnp.ones((4, 2)), jnp.arange(4.0)" if kind == "SoftQuicksort" else "jnp.ones(4)"
    code = f"""
import jax, jax.numpy as jnp
from flax import nnx
from hyperlayer_jax import nn
rngs = nnx.Rngs(0)
tuples = nn.FreeTuples((3,), 2, (4,), rngs=rngs)
model = {build}
leaves = lambda out: jax.tree.leaves(out)[-1]
graphdef, params, rest = nnx.split(model, nnx.Param, ...)
@jax.jit
def step(params, rest):
    model = nnx.merge(graphdef, params, rest, copy=True)
    y = leaves(model({arguments})).sum()
    return y, nnx.split(model, nnx.Param, ...)[2]
y, rest = step(params, rest)
model = nnx.merge(graphdef, params, rest)
stream = model.sampler.rngs if hasattr(model, "sampler") else model.rngs
assert stream.count[...] == 1 and jnp.isfinite(y)
leaves(nnx.view(model, deterministic=True)({arguments}))
"""
    modes = {"NNX_GRAPH_MODE": "false", "NNX_GRAPH_UPDATES": "false"}
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | modes)


def linear(in_shape, num_tuples=1, **options):
    return nn.SparseLinear(in_shape, 3, num_tuples, **({"rngs": nnx.Rngs(0)} | options))


def layer(**options):
    arguments = {"in_shape": IN, "out_shape": OUT, "rngs": nnx.Rngs(0)} | options
    return nn.HyperLayer(lambda x: None, **arguments)


@pytest.mark.parametrize("batch", [(), (3,), (2, 0), (2, 3)])
def test_a_linear_layer_of_tokens_is_one_of_rows(batch):
    layer = TokenLinear(4, 5, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (*batch, 4))
    kernel, bias = np.asarray(layer.kernel[...]), np.asarray(layer.bias[...])
    assert_close(layer(x), np.asarray(x) @ kernel + bias)


ERRORS = {
    r"out_shape: got \(0,\)": lambda: layer(out_shape=(0,)),
    "by_output: got True": lambda: layer(template=TEMPLATE, columns=(1,), by_output=True),
    "columns: wanted with a template": lambda: layer(template=TEMPLATE),
    "columns: wanted with a template, and": lambda: layer(columns=(1,)),
    r"columns: got \(1, 3\), want": lambda: layer(template=TEMPLATE, columns=(1, 3)),
    r"columns: got \(1, 1\), want": lambda: layer(template=TEMPLATE, columns=(1, 1)),
    "template: got 2 columns, want 3": lambda: layer(template=TEMPLATE[:, :2], columns=(1,)),
    "template: got float32, want int32": lambda: layer(
        template=TEMPLATE.astype(jnp.float32), columns=(1,)
    ),
    "num_feature_axes: got -1": lambda: layer(num_feature_axes=-1),
    r"x: got shape \(\), want": lambda: layer()(jnp.zeros(())),
    "x: got int32, want a floating": lambda: layer()(jnp.zeros(4, jnp.int32)),
    "hypernetwork: got a tuple, want IndexTuples": lambda: nn.HyperLayer(
        lambda x: (x, x, x), 4, 3, rngs=nnx.Rngs(0)
    )(jnp.ones(4)),
    r"x: got shape \(5,\), want \[\*B, 4\]": lambda: layer()(jnp.zeros(5)),
    r"x: got shape \(5, 32, 24\), want \[\*B, 24, 32\]": lambda: linear((24, 32))(
        jnp.zeros((5, 32, 24))
    ),
    r"x: got shape \(5, 2, 384\), want": lambda: linear((24, 32))(jnp.zeros((5, 2, 384))),
    "num_tuples: got -1": lambda: linear(4, -1),
    "num_tuples: got 0, want at least 1": lambda: linear(4, 0),
    "num_tuples: got 0, want at least": lambda: linear(4, 0, values=1.0),
    "rngs: got no stream 'sample'": lambda: linear(4, 1, values=1.0, rngs=nnx.Rngs(params=0)),
    "rngs: got no stream 'sample' and": lambda: nn.SoftQuicksort(
        num_samples=1, certainty=1.0, rngs=nnx.Rngs(params=0)
    ),
    r"x: got in_shape \(5,\) and 2 axes": lambda: linear(4, 1)(
        hl.RowSparseTensor(jnp.zeros((2, 3, 1), jnp.int32), jnp.ones((2, 3)), (2,), (5,))
    ),
    "model: got no SparseLinear": lambda: nn.freeze(nnx.Linear(2, 3, rngs=nnx.Rngs(0))),
}


@pytest.mark.parametrize("message", ERRORS)
def test_wrong_input_names_the_argument(message):
    with pytest.raises(ValueError, match=message):
        ERRORS[message]()
