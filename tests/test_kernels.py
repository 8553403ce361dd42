"""Laws of the sparse products, against a float64 oracle written entry by entry."""

import jax
import jax.numpy as jnp
import kernels_oracle as oracle
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from jax.test_util import check_grads

from hyperlayer_jax import kernels

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
    entries = jnp.zeros((2, 11), jnp.int32)
    cases = {
        r"values must have shape \[\*B,i,p\] with \*B=\(2,\), i=5, p=3; got \(2, 5, 4\)": (
            lambda: kernels.ell_spmm(indices, jnp.zeros((2, 5, 4)), dense)
        ),
        r"dense must have shape .* with \*B=\(2,\).*got \(3, 7, 4\)": (
            lambda: kernels.ell_spmm(indices, values, jnp.zeros((3, 7, 4)))
        ),
        r"indices must have shape .*got \(3,\)": (
            lambda: kernels.ell_spmm(jnp.zeros(3, jnp.int32), values, dense)
        ),
        "indices must be int32, got int16": (
            lambda: kernels.ell_sddmm(indices.astype(jnp.int16), values, dense)
        ),
        "values must be one of bfloat16, float32, float64; got int32": (
            lambda: kernels.ell_spmm(indices, indices, dense)
        ),
        "dense must be float32 like the others, got bfloat16": (
            lambda: kernels.ell_spmm(indices, values, dense.astype(jnp.bfloat16))
        ),
        r"cols must have shape .*got \(2, 12\)": (
            lambda: kernels.sddmm(entries, jnp.zeros((2, 12), jnp.int32), dense, dense)
        ),
        "num_rows must be a static integer of at least 0, got -1": (
            lambda: kernels.spmm(entries, entries, jnp.zeros((2, 11)), dense, num_rows=-1)
        ),
        "num_cols must be a static integer of at least 0, got 2.0": (
            lambda: kernels.ell_spmm_transposed(indices, values, dense[:, :5], num_cols=2.0)
        ),
        "implementation must be None or one of 'xla', got 'cusparse'": (
            lambda: kernels.ell_spmm(indices, values, dense, implementation="cusparse")
        ),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()
