"""The choice of a backend: by name, and by what is measured."""

import re
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from kernels_cases import assert_close, example

from hyperlayer_jax import kernels, nn
from hyperlayer_jax.kernels import dispatch
from hyperlayer_jax.kernels.products import reference


@pytest.fixture
def backend(monkeypatch):
    """A backend called "probe" that serves two operations, up to 8 features, and logs its calls."""

    def serve(operation):
        def function(*operands, interpret, **sizes):
            assert all(x.ndim == r for x, r in zip(operands, (3, 3, 3), strict=True))
            module.calls.append((operation, operands[0].shape, interpret))
            return getattr(reference, operation)(*operands, **sizes)

        return function

    def lacks(operation, *operands, **sizes):
        return "d = 9 is above 8" if operands[-1].shape[-1] > 8 else ""

    module = types.ModuleType("probe")
    module.calls, module.lacks = [], lacks
    for name in ("ell_spmm", "ell_sddmm"):
        setattr(module, name, serve(name))
        monkeypatch.setitem(dispatch.SERVES, name, ("reference", "cpu", "probe"))
    monkeypatch.setitem(sys.modules, "hyperlayer_jax.kernels.products.probe", module)
    monkeypatch.setattr(dispatch, "BACKENDS", ("reference", "cpu", "probe"))
    monkeypatch.setattr(dispatch, "_PLATFORMS", {"probe": ("cpu",)})
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
    shared = [jax.numpy.broadcast_to(x[:1], x.shape) for x in (positions[0], dense)]
    actual = jax.jit(jax.vmap(force))(values)
    assert_close(actual, function((shared[0],), (values, shared[1])))
    assert backend.calls[-1][1] == (6, 5, 3)


def test_none_takes_what_is_measured_on_the_device_at_hand(backend, monkeypatch):
    """And plain JAX where that lacks something."""
    kind = jax.devices()[0].device_kind
    monkeypatch.setattr(dispatch, "FASTER", {kind: {"ell_spmm": "probe"}})
    for d, served in ((4, True), (9, False)):
        backend.calls.clear()
        function, positions, floats, expected = example("ell_spmm", d=d)
        traced = jax.jit(lambda q, f, function=function: function(q, f)).trace(positions, floats)
        assert_close(traced.lower().compile()(positions, floats), expected(*floats))
        assert bool(backend.calls) == served


def test_every_default_is_a_backend_of_its_operation():
    for fastest in dispatch.FASTER.values():
        for operation, name in fastest.items():
            assert name in dispatch.implementations(operation)
    for operation, names in dispatch.SERVES.items():
        assert names[0] == "reference" and set(names) <= set(dispatch.BACKENDS)
        for name in ("reference", *(n for n in names if n == "cpu")):
            assert callable(getattr(dispatch._module(name, operation), operation))
    assert kernels.implementations("spmm") == ("reference", "cpu", "tpu")
    with pytest.raises(ValueError, match=re.escape("operation: got 'matmul', want one of ell_")):
        kernels.implementations("matmul")


def test_a_kernel_does_not_run_on_a_device_that_it_was_not_written_for():
    function, positions, floats, _ = example("ell_spmm")
    traced = jax.jit(lambda q, f: function(q, f, implementation="tpu")).trace(positions, floats)
    with pytest.raises(NotImplementedError, match="got 'tpu', but it runs on tpu, not on cuda"):
        traced.lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("implementation", dispatch.BACKENDS)
def test_modules_take_every_backend_for_what_it_serves(implementation):
    """And those that do not serve a named operation refuse when that is called itself."""
    options = {"implementation": implementation, "rngs": nnx.Rngs(0)}
    tokens = jax.ShapeDtypeStruct((4, 8, 4), jnp.float32)
    for pattern in ("learned", "learned2d", "static", "strided"):
        layer = nn.SparseSelfAttention(4, 1, 16, pattern=pattern, **options)
        assert jax.eval_shape(lambda x, layer=layer: nnx.clone(layer)(x), tokens).shape == (4, 8, 4)
    for by_output in (True, False):
        for values in (None, 1.0):
            layer = nn.SparseLinear(4, 3, 2, by_output=by_output, values=values, **options)
            out = jax.eval_shape(lambda x, layer=layer: nnx.clone(layer)(x), tokens)
            assert out.shape == (4, 8, 3)
    layer = nn.GlimpseAttention(4, (2, 2), 1, **options)
    images = jax.ShapeDtypeStruct((4, 5, 5, 32), jnp.float32)
    read = lambda i: nnx.clone(layer)(i, jnp.ones((4, 4))).patches  # noqa: E731
    assert jax.eval_shape(read, images).shape == (4, 1, 2, 2, 32)
    if implementation not in dispatch.SERVES["duplicate_mask"]:
        with pytest.raises(NotImplementedError, match="there is no duplicate_mask"):
            kernels.duplicate_mask(jnp.zeros((2, 3, 1), jnp.int32), implementation=implementation)
