"""Laws of the kernels, against a float64 oracle written entry by entry."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from jax.test_util import check_grads
from kernels_cases import (
    OPERATIONS,
    PRODUCTS,
    SERVED,
    SHARED,
    assert_close,
    assert_close_each,
    cases,
    contract,
    example,
    like,
    operations,
    value_and_vjp,
)

from hyperlayer_jax import kernels
from hyperlayer_jax.kernels.products import cpu
from hyperlayer_jax.kernels.redistribution import blocks


@contract
def test_agrees_with_the_oracle(name, implementation):
    function, positions, floats, expected = example(name)
    actual, _ = value_and_vjp(function, positions, floats, implementation=implementation)
    assert actual.dtype == jnp.float32
    assert_close(actual, expected(*floats))


@pytest.mark.parametrize(
    "implementation, name", cases([served for served in SERVED if served[0] != "reference"])
)
def test_gradients_agree_with_plain_jax(name, implementation):
    function, positions, floats, _ = example(name)
    _, gradients = value_and_vjp(function, positions, floats, implementation=implementation)
    _, plain = value_and_vjp(function, positions, floats, implementation="reference")
    assert_close_each(gradients, plain)


@contract
@pytest.mark.parametrize("sizes", [{"p": 1, "n": 1, "d": 1}, {"p": 37, "n": 300, "d": 33}])
def test_any_number_of_entries_and_features(name, sizes, implementation):
    function, positions, floats, expected = example(name, (), **sizes)
    run = jax.jit(lambda *args: function(*args, implementation=implementation))
    assert_close(run(positions, floats), expected(*floats))


@pytest.mark.parametrize("name", PRODUCTS)
def test_cpus_take_blocks_of_entries_and_members_one_by_one(name, monkeypatch):
    """Enough features, entries and batch axes for all loops that CPUs need."""
    monkeypatch.setattr(cpu, "_BLOCK", 8)
    function, positions, floats, expected = example(name, p=9, d=9)
    out, gradients = value_and_vjp(function, positions, floats, implementation="cpu")
    assert_close(out, expected(*floats))
    _, wanted = value_and_vjp(function, positions, floats, implementation="reference")
    assert_close_each(gradients, wanted)


@contract
def test_bfloat16_accumulates_in_float32(name, implementation):
    function, positions, floats, expected = example(name, p=200, n=200, dtype=jnp.bfloat16)
    actual, gradients = value_and_vjp(function, positions, floats, implementation=implementation)
    assert actual.dtype == jnp.bfloat16
    assert [g.dtype for g in gradients] == [f.dtype for f in floats]
    expected = jnp.asarray(expected(*floats), jnp.bfloat16)
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), np.asarray(expected, np.float64), 2**-7, 1e-3
    )


@operations
def test_derivatives_are_those_of_finite_differences(name):
    """In both modes; those of second order are asked of the public functions that use these."""
    with jax.enable_x64(True):
        function, positions, floats, expected = example(name, dtype=jnp.float64)
        function = jax.jit(function)
        assert_close(function(positions, floats), expected(*floats), jnp.float64)
        check_grads(lambda *f: function(positions, f), floats, order=1, modes=["fwd", "rev"])


@pytest.mark.parametrize("name", PRODUCTS)
def test_gradient_is_the_transpose(name):
    """<g, f(u)> = <vjp(g), u> for each linear operand alone."""
    function, positions, floats, expected = example(name, dtype=jnp.bfloat16)
    _, gradients = value_and_vjp(function, positions, floats)
    for gradient, operand in zip(gradients, floats, strict=True):
        inner = np.vdot(*(np.asarray(a, np.float64) for a in (gradient, operand)))
        np.testing.assert_allclose(inner, np.sum(expected(*floats) ** 2), 3e-2)


@operations
def test_positions_have_no_gradient(name):
    function, positions, floats, _ = example(name)
    gradient = jax.grad(lambda q: function(q, floats).sum(), allow_int=True)
    gradient = jax.eval_shape(gradient, positions)
    assert all(leaf.dtype == jax.dtypes.float0 for leaf in gradient)


# All backends share their rules of batching: other operands, and all of them, for one of a kind.
OF_A_KIND = (("reference", "ell_spmm"), ("reference", "gathered_attention"))


@pytest.mark.parametrize(
    "implementation, name, mapped",
    [
        pytest.param(*case.values, mapped, marks=case.marks)
        for case in cases(SHARED)
        for mapped in (("all", "first", "last") if case.values in OF_A_KIND else ("first",))
    ],
)
def test_vmap_and_grad_commute(name, mapped, implementation):
    function, positions, floats, _ = example(name, (3, 2), p=2)
    chosen = {"all": range(len(floats) + 1), "first": (1,), "last": (len(floats),)}[mapped]
    axes = [0 if n in chosen else None for n in range(len(floats) + 1)]
    args = [
        jax.tree.map(lambda x, axis=axis: x[0] if axis is None else x, arg)
        for axis, arg in zip(axes, (positions, *floats), strict=True)
    ]

    def loss(positions, *floats):
        return (function(positions, floats, implementation=implementation) ** 2).sum()

    each = jax.grad(loss, tuple(range(1, len(args))))

    @jax.jit
    def all_ways(args):
        def alone(n):
            return each(
                *(
                    jax.tree.map(lambda x, axis=axis: x if axis is None else x[n], arg)
                    for axis, arg in zip(axes, args, strict=True)
                )
            )

        summed = jax.grad(lambda floats: jax.vmap(loss, axes)(args[0], *floats).sum())
        return jax.lax.map(alone, jnp.arange(3)), jax.vmap(each, axes)(*args), summed(args[1:])

    expected, mapped, summed = all_ways(args)
    for e, a, s, axis in zip(expected, mapped, summed, axes[1:], strict=True):
        np.testing.assert_allclose(a, e, 1e-4, 1e-4)
        np.testing.assert_allclose(s, e.sum(0) if axis is None else e, 1e-4, 1e-4)


@pytest.mark.parametrize(
    "implementation, name",
    cases([served for served in SERVED if not served[1].endswith("redistribute")]),
)
def test_absent_entries_read_nothing(name, implementation):
    """A value that is not finite never leaks from a row that no entry selects."""
    function, positions, floats, _ = example(name)
    positions = tuple(jnp.full_like(p, s) for p, s in zip(positions, (-1, 2**31 - 1), strict=False))
    floats = tuple(jnp.full_like(f, jnp.nan) for f in floats)
    cotangent = like(function, positions, floats, jnp.nan)
    out, gradients = value_and_vjp(
        function, positions, floats, cotangent, implementation=implementation
    )
    for array in (out, *gradients):
        np.testing.assert_array_equal(array, 0)


@pytest.mark.parametrize(
    "implementation, name", cases([served for served in SERVED if served[1] not in PRODUCTS])
)
def test_all_masked_is_zero_with_zero_gradient(name, implementation):
    function, positions, floats, _ = example(name)
    if name.endswith("redistribute"):
        positions = positions[0], jnp.zeros_like(positions[1])
    else:
        floats = *floats[:-1], jnp.full_like(floats[-1], -jnp.inf)
    cotangent = like(function, positions, floats, 1)
    out, gradients = value_and_vjp(
        function, positions, floats, cotangent, implementation=implementation
    )
    for array in (out, *gradients):
        np.testing.assert_array_equal(array, 0)


def axes_of(name):
    """The sizes of `example` that an operation has."""
    if name.endswith("redistribute"):
        return "np"
    return "ijnd" if name in ("spmm", "sddmm") else "ijpd"


@pytest.mark.parametrize(
    "name, axis",
    [(n, axis) for n in (*OPERATIONS, "lone_redistribute") for axis in ("batch", *axes_of(n))],
)
def test_empty_is_ordinary(name, axis):
    function, positions, floats, expected = example(name, **{axis: (0,) if axis == "batch" else 0})
    out, gradients = value_and_vjp(function, positions, floats)
    assert_close(out, expected(*floats))
    assert [g.shape for g in gradients] == [f.shape for f in floats]


@pytest.mark.parametrize("name", ["redistribute", "lone_redistribute"])
@pytest.mark.parametrize("sigma", [0.0, 1e-3, 1e30])
def test_redistribute_is_finite_and_conserves(name, sigma):
    function, (points, _), (means, sigmas, values), _ = example(name, n=40)
    means = means.at[..., 1].multiply(1e9)
    floats = means, jnp.full_like(sigmas, sigma), values
    allowed = jnp.ones(points.shape[:-1], bool)
    out, gradients = value_and_vjp(function, (points, allowed), floats)
    np.testing.assert_allclose(out.sum(-1), values.sum(-1), 1e-5, 1e-5)
    assert all(jnp.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("batch", [(2,), (2, 3)])
@pytest.mark.parametrize("n", [11, 20], ids=["few points", "many points"])
def test_redistribute_walks_in_blocks_what_does_not_fit(batch, n, implementation, monkeypatch):
    function, positions, floats, expected = example("redistribute", batch, p=10, n=n)
    points = n if implementation == "reference" else n * math.prod(batch)
    monkeypatch.setattr(blocks, "MAX_BLOCK", 3 * points)
    out, gradients = value_and_vjp(function, positions, floats, implementation=implementation)
    assert_close(out, expected(*floats))
    monkeypatch.undo()
    _, whole = value_and_vjp(function, positions, floats)
    assert_close_each(gradients, whole)


@pytest.mark.parametrize("n", [11, 20], ids=["few points", "many points"])
def test_a_lone_tuple_has_the_gradient_that_it_has_beside_one_of_value_0(n):
    function, positions, floats, _ = example("redistribute", (2, 3), p=2, n=n)
    floats = *floats[:2], floats[2].at[..., 1].set(0)
    out, gradients = value_and_vjp(function, positions, floats)
    alone, alone_gradients = value_and_vjp(function, positions, [x[:, :, :1] for x in floats])
    np.testing.assert_allclose(alone, out, 1e-5, 1e-6)
    for got, want in zip(alone_gradients, gradients, strict=True):
        np.testing.assert_allclose(got, want[:, :, :1], 1e-4, 1e-5)
        assert (np.asarray(got) != 0).any()


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bfloat16, jnp.float32])
def test_what_is_stored_is_the_same_array(dtype):
    """Forward, in both directions of differentiation, and for each of a batch."""
    x = jnp.asarray([[-3e38, -1.5, 0], [2**-126, 7, 3e38]]).astype(dtype)
    for function in (
        kernels.materialize,
        jax.vmap(kernels.materialize),
        jax.vmap(jax.vmap(kernels.materialize)),
    ):
        got = jax.jit(function)(x)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, x)
    if dtype != jnp.int32:
        value, tangent = jax.jvp(kernels.materialize, (x,), (x + 1,))
        (cotangent,) = jax.vjp(kernels.materialize, x)[1](x)
        for got, want in ((value, x), (tangent, x + 1), (cotangent, x)):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("implementation, name", cases(SHARED))
def test_shard_map_shards_the_batch(name, implementation, monkeypatch):
    """Values and gradients agree, also of the first operand, the same on every shard."""
    monkeypatch.setattr(cpu, "_BLOCK", 8)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    function, positions, floats, _ = example(name, (4,), p=20, d=8)
    first = floats[0][0]

    def batched(positions, first, *floats):
        return jax.vmap(
            lambda q, *f: function(q, (first, *f), implementation=implementation),
        )(positions, *floats)

    split = PartitionSpec("data")
    sharded = jax.shard_map(
        batched,
        mesh=mesh,
        in_specs=(split, PartitionSpec(), *[split] * (len(floats) - 1)),
        out_specs=split,
        # The interpreter of Pallas does not mark what varies over a mesh; compiled kernels are.
        check_vma=implementation in (None, "reference"),
    )

    @jax.jit
    def run(*floats):
        out, vjp = jax.vjp(lambda *f: sharded(positions, *f), *floats)
        return out, vjp(out)

    out, (of_first, *gradients) = run(first, *floats[1:])
    everywhere = (jnp.broadcast_to(first, floats[0].shape), *floats[1:])
    wanted, wanted_gradients = value_and_vjp(
        function, positions, everywhere, implementation="reference"
    )
    assert_close_each(
        (out, of_first, *gradients), (wanted, wanted_gradients[0].sum(0), *wanted_gradients[1:])
    )


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
        "implementation: got 'cusparse', want None or one of 'reference', ": (
            lambda: kernels.ell_spmm(indices, values, dense, implementation="cusparse")
        ),
        "where: got float32, want bool": (
            lambda: kernels.redistribute(
                entries[..., None], means, means, values[:, 0], where=jnp.zeros((2, 11))
            )
        ),
        "points: got shape (2, 11, 0), want r >= 1": (
            lambda: kernels.redistribute(
                jnp.zeros((2, 11, 0), jnp.int32),
                means[..., :0],
                means[..., :0],
                values[:, 0],
                where=entries > 0,
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
