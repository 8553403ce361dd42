"""Laws of the sparse products, against a float64 oracle written entry by entry."""

import re
import sys
import types

import jax
import jax.numpy as jnp
import kernels_oracle as oracle
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from jax.test_util import check_grads

from hyperlayer_jax import kernels
from hyperlayer_jax.kernels import api, xla

OPERATIONS = ("ell_spmm", "ell_spmm_transposed", "ell_sddmm", "spmm", "sddmm")


def example(name, batch=(2,), *, i=5, j=7, p=3, n=11, d=4, dtype=jnp.float32):
    """(function of the float operands, positions, float operands, oracle) of one operation.

    Positions run from 2 below their axis to 2 beyond it, and repeat.
    """
    rng = np.random.default_rng(0)

    def position(size, *shape):
        return jnp.asarray(rng.integers(-2, size + 2, (*batch, *shape)), jnp.int32)

    def operand(*shape):
        return jnp.asarray(rng.standard_normal((*batch, *shape)), dtype)

    if name.startswith("ell"):
        positions = (position(j, i, p),)
        rows, cols = oracle.ell_entries(np.asarray(positions[0]))
        values_shape = (i, p)
    else:
        positions = (position(i, n), position(j, n))
        rows, cols = map(np.asarray, positions)
        values_shape = (n,)
    values, left, right = operand(*values_shape), operand(i, d), operand(j, d)

    def flat(values):
        return np.asarray(values, np.float64).reshape(rows.shape)

    operation = getattr(kernels, name)
    if name.endswith("sddmm"):
        floats = (left, right)

        def expected(left, right):
            return oracle.sddmm(rows, cols, left, right).reshape(*batch, *values_shape)
    elif name == "ell_spmm_transposed":
        floats = (values, left)

        def expected(values, left):
            return oracle.spmm(cols, rows, flat(values), left, j)
    else:
        floats = (values, right)

        def expected(values, right):
            return oracle.spmm(rows, cols, flat(values), right, i)

    sizes = {"ell_spmm_transposed": {"num_cols": j}, "spmm": {"num_rows": i}}.get(name, {})

    def function(positions, floats, **options):
        return operation(*positions, *floats, **sizes, **options)

    return function, positions, floats, expected


def assert_close(actual, expected, dtype=jnp.float32):
    tolerance = {"bfloat16": 2e-2, "float32": 1e-5, "float64": 1e-12}[jnp.dtype(dtype).name]
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), np.asarray(expected, np.float64), tolerance, tolerance
    )


@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("batch", [(), (2,), (2, 1, 3)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_agrees_with_the_oracle(name, batch, implementation):
    function, positions, floats, expected = example(name, batch)
    actual = jax.jit(lambda *a: function(*a, implementation=implementation))(positions, floats)
    assert actual.dtype == jnp.float32
    assert_close(actual, expected(*floats))


@pytest.mark.parametrize("sizes", [{"p": 1, "n": 1, "d": 1}, {"p": 37, "n": 300, "d": 33}])
@pytest.mark.parametrize("name", OPERATIONS)
def test_any_number_of_entries_and_features(name, sizes):
    function, positions, floats, expected = example(name, **sizes)
    assert_close(function(positions, floats), expected(*floats))


@pytest.mark.parametrize("name", OPERATIONS)
def test_bfloat16_accumulates_in_float32(name):
    function, positions, floats, expected = example(name, p=200, n=200, dtype=jnp.bfloat16)
    actual = function(positions, floats)
    assert actual.dtype == jnp.bfloat16
    expected = jnp.asarray(expected(*floats), jnp.bfloat16)
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), np.asarray(expected, np.float64), 2**-7, 1e-4
    )


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_match_finite_differences(name, batch):
    with jax.enable_x64(True):
        function, positions, floats, expected = example(name, batch, dtype=jnp.float64)
        assert_close(function(positions, floats), expected(*floats), jnp.float64)
        check_grads(lambda *f: function(positions, f), floats, order=2, modes=["rev"])


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradient_is_the_transpose(name):
    """<g, f(u)> = <vjp(g), u> for each linear operand alone."""
    function, positions, floats, expected = example(name, dtype=jnp.bfloat16)
    out, vjp = jax.vjp(lambda *f: function(positions, f), *floats)
    for gradient, operand in zip(vjp(out), floats, strict=True):
        assert gradient.dtype == operand.dtype
        inner = np.vdot(*(np.asarray(a, np.float64) for a in (gradient, operand)))
        np.testing.assert_allclose(inner, np.sum(expected(*floats) ** 2), 3e-2)


@pytest.mark.parametrize("name", OPERATIONS)
def test_positions_have_no_gradient(name):
    function, positions, floats, _ = example(name)
    gradient = jax.grad(lambda q: function(q, floats).sum(), allow_int=True)(positions)
    assert all(leaf.dtype == jax.dtypes.float0 for leaf in gradient)


@pytest.mark.parametrize("shared", ["nothing", "positions", "first", "second"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_vmap_and_grad_commute(name, shared):
    function, positions, floats, _ = example(name, (3, 2))
    first, second = floats
    axes = {"positions": 0, "first": 0, "second": 0} | {shared: None}
    axes = (axes["positions"], axes["first"], axes["second"])
    args = [
        jax.tree.map(lambda a: a[0], arg) if axis is None else arg
        for arg, axis in zip((positions, first, second), axes, strict=True)
    ]

    def loss(positions, first, second):
        return (function(positions, (first, second)) ** 2).sum()

    def stacked(fn, *args):
        pick = [
            lambda arg, k, axis=axis: jax.tree.map(lambda a: a if axis is None else a[k], arg)
            for axis in axes
        ]
        results = [fn(*(p(a, k) for p, a in zip(pick, args, strict=True))) for k in range(3)]
        return jax.tree.map(lambda *r: jnp.stack(r), *results)

    each = jax.grad(loss, (1, 2))
    expected = stacked(each, *args)
    for a, e in zip(jax.vmap(each, axes)(*args), expected, strict=True):
        assert_close(a, e, jnp.float32)
    summed = jax.grad(lambda *a: jax.vmap(loss, axes)(*a).sum(), (1, 2))(*args)
    for a, e, axis in zip(summed, expected, axes[1:], strict=True):
        np.testing.assert_allclose(a, e.sum(0) if axis is None else e, 1e-4, 1e-4)


@pytest.mark.parametrize("name", OPERATIONS)
def test_absent_entries_read_nothing(name):
    """A value that is not finite never leaks from a row that no entry selects."""
    function, positions, floats, _ = example(name)
    positions = tuple(jnp.full_like(p, s) for p, s in zip(positions, (-1, 2**31 - 1), strict=False))
    floats = tuple(jnp.full_like(f, jnp.nan) for f in floats)
    out, vjp = jax.vjp(lambda *f: function(positions, f), *floats)
    for array in (out, *vjp(jnp.full_like(out, jnp.nan))):
        np.testing.assert_array_equal(array, 0)


@pytest.mark.parametrize(
    "empty", [{"batch": (0,)}, *({axis: 0} for axis in "ijpnd")], ids=lambda e: next(iter(e))
)
@pytest.mark.parametrize("name", OPERATIONS)
def test_empty_is_ordinary(name, empty):
    function, positions, floats, expected = example(name, **empty)
    out, vjp = jax.vjp(lambda *f: function(positions, f), *floats)
    assert_close(out, expected(*floats))
    assert [g.shape for g in vjp(out)] == [f.shape for f in floats]


@pytest.mark.parametrize("replicated", [None, 0, 1])
@pytest.mark.parametrize("name", OPERATIONS)
def test_shard_map_shards_the_batch(name, replicated):
    """Values and gradients agree, also where one operand is the same on every shard."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    function, positions, floats, _ = example(name, (4,), p=20)
    floats = [f[0] if k == replicated else f for k, f in enumerate(floats)]

    def batched(positions, *floats):
        return jax.vmap(
            lambda q, *f: function(q, f),
            (0, *(None if k == replicated else 0 for k in range(2))),
        )(positions, *floats)

    def loss(fn):
        return lambda floats: (fn(positions, *floats) ** 2).sum()

    specs = [PartitionSpec() if k == replicated else PartitionSpec("data") for k in range(2)]
    sharded = jax.shard_map(
        batched,
        mesh=mesh,
        in_specs=(PartitionSpec("data"), *specs),
        out_specs=PartitionSpec("data"),
    )
    actual = jax.jit(jax.value_and_grad(loss(sharded)))(floats)
    expected = jax.value_and_grad(loss(batched))(floats)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, 1e-4, 1e-4), actual, expected)


def test_wrong_input_names_the_argument():
    indices, values = jnp.zeros((2, 5, 3), jnp.int32), jnp.zeros((2, 5, 3))
    dense = jnp.zeros((2, 7, 4))
    entries, means = jnp.zeros((2, 11), jnp.int32), jnp.zeros((2, 3, 1))
    cases = {
        r"values: got shape (2, 5, 4), want [*B,i,p] with *B = (2,), i = 5, p = 3": (
            lambda: kernels.ell_spmm(indices, jnp.zeros((2, 5, 4)), dense)
        ),
        "dense: got shape (3, 7, 4), want [*B,j,d] with *B = (2,), j = 7, d = 4": (
            lambda: kernels.ell_spmm(indices, values, jnp.zeros((3, 7, 4)))
        ),
        "indices: got shape (3,), want [*B,i,p] with *B = (), i = 3": (
            lambda: kernels.ell_spmm(jnp.zeros(3, jnp.int32), values, dense)
        ),
        "indices: got int16, want int32": (
            lambda: kernels.ell_sddmm(indices.astype(jnp.int16), values, dense)
        ),
        "values: got int32, want one of bfloat16, float32, float64": (
            lambda: kernels.ell_spmm(indices, indices, dense)
        ),
        "dense: got bfloat16, want float32 like the others": (
            lambda: kernels.ell_spmm(indices, values, dense.astype(jnp.bfloat16))
        ),
        "cols: got shape (2, 12), want [*B,n] with *B = (2,), n = 11": (
            lambda: kernels.sddmm(entries, jnp.zeros((2, 12), jnp.int32), dense, dense)
        ),
        "num_rows: got -1, want a static integer of at least 0": (
            lambda: kernels.spmm(entries, entries, jnp.zeros((2, 11)), dense, num_rows=-1)
        ),
        "num_cols: got 2.0, want a static integer of at least 0": (
            lambda: kernels.ell_spmm_transposed(indices, values, dense[:, :5], num_cols=2.0)
        ),
        "implementation: got 'cusparse', want None or one of 'xla'": (
            lambda: kernels.ell_spmm(indices, values, dense, implementation="cusparse")
        ),
        "where: got float32, want bool": (
            lambda: kernels.redistribute(
                entries[..., None], means, means, values[:, 0], jnp.zeros((2, 11))
            )
        ),
        "points: got shape (2, 11, 0), want r >= 1": (
            lambda: kernels.redistribute(
                jnp.zeros((2, 11, 0), jnp.int32),
                means[..., :0],
                means[..., :0],
                values[:, 0],
                entries > 0,
            )
        ),
        "v: got shape (2, 5, 4), want [*B,s,dv] with *B = (2,), s = 7": (
            lambda: kernels.gathered_attention(
                jnp.zeros((2, 5, 4)), dense, jnp.zeros((2, 5, 4)), indices, values
            )
        ),
        "q: got shape (2, 5, 0), want d >= 1": (
            lambda: kernels.gathered_attention(
                jnp.zeros((2, 5, 0)), dense[..., :0], dense, indices, values
            )
        ),
        "block: got 3 for 15 queries in 5 blocks and 7 keys, want": (
            lambda: kernels.block_attention(
                jnp.zeros((2, 15, 4)), dense, dense, indices, values, block=3, causal=True
            )
        ),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


@pytest.fixture
def backend(monkeypatch):
    """A backend called "probe" that serves two operations, up to 8 features, and logs its calls."""

    def serve(operation):
        def function(*operands, interpret, **sizes):
            assert all(x.ndim == r for x, r in zip(operands, (3, 3, 3), strict=True))
            module.calls.append((operation, operands[0].shape, interpret))
            return getattr(xla, operation)(*operands, **sizes)

        return function

    def lacks(operation, *operands, **sizes):
        return "d = 9 is above 8" if operands[-1].shape[-1] > 8 else ""

    module = types.ModuleType("probe")
    module.calls, module.lacks = [], lacks
    module.ell_spmm, module.ell_sddmm = serve("ell_spmm"), serve("ell_sddmm")
    monkeypatch.setitem(sys.modules, "hyperlayer_jax.kernels.probe", module)
    monkeypatch.setattr(api, "_BACKENDS", ("xla", "probe"))
    return module


def test_a_forced_backend_serves_or_says_what_it_lacks(backend):
    function, positions, floats, expected = example("ell_spmm", (2, 3))
    assert_close(function(positions, floats, implementation="probe"), expected(*floats))
    assert backend.calls[0] == ("ell_spmm", (6, 5, 3), True)
    with pytest.raises(NotImplementedError, match="got 'probe', but there is no ell_spmm_transp"):
        jax.grad(lambda f: function(positions, f, implementation="probe").sum())(floats)
    function, positions, floats, _ = example("ell_sddmm", d=9)
    with pytest.raises(NotImplementedError, match="got 'probe', but d = 9 is above 8"):
        function(positions, floats, implementation="probe")


def test_a_backend_sees_one_batch_axis_under_vmap(backend):
    function, positions, (values, dense), _ = example("ell_spmm", (3, 2))
    force = lambda values: function(  # noqa: E731
        (positions[0][0],), (values, dense[0]), implementation="probe"
    )
    shared = [jnp.broadcast_to(x[:1], x.shape) for x in (positions[0], dense)]
    actual = jax.jit(jax.vmap(force))(values)
    assert_close(actual, function((shared[0],), (values, shared[1])))
    assert backend.calls[-1][1] == (6, 5, 3)


def test_none_takes_what_is_listed_as_faster(backend, monkeypatch):
    rows = (("probe", lambda indices, values, dense: dense.shape[-1] > 2),)
    monkeypatch.setattr(api, "_FASTER", {(jax.default_backend(), "ell_spmm"): rows})
    for d, served in ((2, False), (4, True), (9, False)):
        backend.calls.clear()
        function, positions, floats, expected = example("ell_spmm", d=d)
        traced = jax.jit(lambda q, f, function=function: function(q, f)).trace(positions, floats)
        assert bool(backend.calls) == served
        assert_close(traced.lower().compile()(positions, floats), expected(*floats))
