"""The choice of backend, with one that only logs what it is asked for."""

import sys
import types

import jax
import jax.numpy as jnp
import pytest
from test_kernels import assert_close, example

from hyperlayer_jax.kernels import dispatch, xla


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
    monkeypatch.setattr(dispatch, "_BACKENDS", ("xla", "probe"))
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
    monkeypatch.setattr(dispatch, "_FASTER", {(jax.default_backend(), "ell_spmm"): rows})
    for d, served in ((2, False), (4, True), (9, False)):
        backend.calls.clear()
        function, positions, floats, expected = example("ell_spmm", d=d)
        traced = jax.jit(lambda q, f, function=function: function(q, f)).trace(positions, floats)
        assert bool(backend.calls) == served
        assert_close(traced.lower().compile()(positions, floats), expected(*floats))
