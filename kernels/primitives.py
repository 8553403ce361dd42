"""Operations as JAX primitives, so that every derivative exists and kernels serve the usual ones.

Two kinds of operation:

- *Products* are linear in each of two operands. Their derivatives are products, to any order.
- *Functions* have a meaning in plain JAX and a gradient of their own, which reverse mode calls. All
  other derivatives, those of forward mode and all second ones, are those of the meaning.

`jax.custom_vjp` would forbid forward mode, and `jax.custom_jvp` cannot say which function is the
transpose. A primitive has a rule for each: evaluation (by `dispatch`), jvp, transposition, and
`vmap`, under which all operands get the same leading axes *B. Integers and bools have no
derivative.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from . import dispatch

# Of each primitive, the function that evaluates it, and the one that tells shapes and dtypes.
EVALUATE: dict[Primitive, Callable[..., list]] = {}
_SHAPES: dict[Primitive, Callable[..., list]] = {}


def _primitive(name: str, evaluate: Callable[..., list], shapes: Callable[..., list]) -> Primitive:
    """A primitive with several results, of operands [*B,...] that vary alike inside `shard_map`.

    Args:
      name: what programs call it.
      evaluate: of operands and parameters, among them `platform` and `partitioned` of
        `dispatch.run`, to a list of arrays.
      shapes: of operands and parameters, to the shape and dtype of each result.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True

    @primitive.def_effectful_abstract_eval
    def _(*operands, **params):
        mesh, varying = operands[0].sharding.mesh, operands[0].manual_axis_type
        results = [
            jax.core.ShapedArray(
                shape,
                dtype,
                sharding=NamedSharding(mesh, PartitionSpec(*[None] * len(shape))),
                manual_axis_type=varying,
            )
            for shape, dtype in shapes(*operands, **params)
        ]
        return results, _effects(evaluate, operands, **params)

    @functools.lru_cache(4096)
    def compiled(**params):
        return jax.jit(functools.partial(_bind, primitive, **params))

    @primitive.def_impl
    def _(*operands, **params):
        return compiled(**params)(*operands)

    def lower(context, *operands, **params):
        module = context.module_context
        partitioned = _is_partitioned(module.axis_context)

        def run(*arrays):
            if any(0 in x.shape for x in (*arrays, *context.avals_out)):
                # Sums of nothing.
                return [jnp.zeros_like(arrays[0], x.dtype, x.shape) for x in context.avals_out]
            on = {
                platform: functools.partial(
                    evaluate, platform=platform, partitioned=partitioned, **params
                )
                for platform in module.platforms
            }
            if len(on) == 1:
                return on.popitem()[1](*arrays)
            return jax.lax.platform_dependent(*arrays, **on)

        return mlir.lower_fun(run, multiple_results=True)(context, *operands)

    mlir.register_lowering(primitive, lower)

    def batch(operands, axes, *, leading, **params):
        size = next(x.shape[a] for x, a in zip(operands, axes, strict=True) if a is not None)
        operands = [
            jnp.broadcast_to(x[None], (size, *x.shape)) if a is None else jnp.moveaxis(x, a, 0)
            for x, a in zip(operands, axes, strict=True)
        ]
        out = _bind(primitive, *operands, leading=leading + 1, **params)
        return out, [0] * len(out)

    batching.primitive_batchers[primitive] = batch
    EVALUATE[primitive], _SHAPES[primitive] = evaluate, shapes
    return primitive


def _is_partitioned(context):
    """Whether the compiler has axes of devices left to divide a program over."""
    if hasattr(context, "manual_axes"):
        left = set(context.mesh.shape) - set(context.manual_axes)
        return any(context.mesh.shape[axis] > 1 for axis in left)
    return getattr(context, "num_devices", 1) not in (None, 1)


def _effects(evaluate, operands, *, implementation, **params):
    """What the interpreter of a kernel does besides computing; nothing elsewhere."""
    if implementation not in dispatch.INTERPRETED_WITH_EFFECTS or jax.default_backend() != "cpu":
        return set()
    params |= {"implementation": implementation, "platform": "cpu", "partitioned": False}
    shapes = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=x.manual_axis_type)
        for x in operands
    ]
    return jax.make_jaxpr(functools.partial(evaluate, **params))(*shapes).effects


def _bind(primitive: Primitive, *operands: jax.Array, **params: Any) -> list[jax.Array]:
    """Binds a primitive of this file to operands [*B,...], wherever these live.

    Inside `shard_map` all operands are made to vary over the axes that any of them varies over,
    since a gradient must vary as its operand does; the transpose of this cast sums over shards. On
    a mesh of explicit axes the operation runs under automatic ones: its batch axes stay sharded as
    they are, all others of the results are whole.
    """
    varying = [jax.typeof(x).manual_axis_type.varying for x in operands]
    axes = frozenset().union(*varying)
    alike = [
        jax.lax.pcast(x, tuple(axes - own), to="varying")
        for x, own in zip(operands, varying, strict=True)
    ]
    shardings = [jax.typeof(x).sharding for x in alike]
    explicit = [s.mesh for s in shardings if AxisType.Explicit in s.mesh.axis_types]
    if not explicit:
        return primitive.bind(*alike, **params)
    leading = params["leading"]
    batch = [
        next((axis for axis in axes if axis is not None), None)
        for axes in zip(*(s.spec[:leading] for s in shardings), strict=True)
    ]
    specs = tuple(
        PartitionSpec(*batch, *[None] * (len(shape) - leading))
        for shape, _ in _SHAPES[primitive](*alike, **params)
    )
    return _automatic(primitive, explicit[0], specs, **params)(*alike)


@functools.lru_cache(4096)
def _automatic(primitive, mesh, specs, **params):
    bind = functools.partial(primitive.bind, **params)

    @jax.jit
    def run(*operands):
        with jax.sharding.use_abstract_mesh(mesh):
            return jax.sharding.auto_axes(bind, out_sharding=list(specs))(*operands)

    return run


# A sparse matrix has a form that is linear in its values, in a left and in a right dense operand:
# the sum over entries n of values[n] left[row n] . right[column n]. Its products are the partial
# derivatives of that form, so that each is a gradient of the others.
VALUES, LEFT, RIGHT = range(3)
_PRODUCTS = {
    "ell": ("ell_sddmm", "ell_spmm", "ell_spmm_transposed"),
    "coo": ("sddmm", "spmm", "spmm"),
}


def _product_call(operands, form, result, rows):
    """What `dispatch` needs to know of a product: its operands, name and sizes."""
    operation = _PRODUCTS[form][result]
    if form == "coo" and result == RIGHT:
        operands = (operands[1], operands[0], *operands[2:])
    sizes = {"spmm": {"num_rows": rows}, "ell_spmm_transposed": {"num_cols": rows}}
    return {"operands": operands, "operation": operation, "sizes": sizes.get(operation, {})}


def _product_shapes(*operands, form, result, rows, leading, implementation):
    dispatch.choose(
        implementation=implementation,
        leading=leading,
        **_product_call(operands, form, result, rows),
    )
    entries, dense = operands[0].shape, operands[-1]
    shape = entries if result == VALUES else (*entries[:leading], rows, dense.shape[-1])
    return [(shape, dense.dtype)]


def _product(*operands, form, result, rows, **params):
    return [dispatch.run(**_product_call(operands, form, result, rows), **params)]


_product_p = _primitive("sparse_product", _product, _product_shapes)


def _product_jvp(primals, tangents, **params):
    terms = [
        _bind(_product_p, *primals[:n], tangents[n], *primals[n + 1 :], **params)[0]
        for n in (len(primals) - 2, len(primals) - 1)
        if not isinstance(tangents[n], ad.Zero)
    ]
    return _bind(_product_p, *primals, **params), [functools.reduce(ad.add_jaxvals, terms)]


def _product_transpose(cotangents, *operands, result, rows, **params):
    del rows
    roles = [role for role in (VALUES, LEFT, RIGHT) if role != result]
    known = {result: cotangents[0]}
    for role, operand in zip(roles, operands[-2:], strict=True):
        if ad.is_undefined_primal(operand):
            unknown, shape = role, operand.aval.shape
        else:
            known[role] = operand
    gradients = [None] * len(operands)
    if not isinstance(cotangents[0], ad.Zero):
        gradients[roles.index(unknown) - 2] = _bind(
            _product_p,
            *operands[:-2],
            *(known[role] for role in sorted(known)),
            result=unknown,
            rows=None if unknown == VALUES else shape[-2],
            **params,
        )[0]
    return gradients


ad.primitive_jvps[_product_p] = _product_jvp
ad.primitive_transposes[_product_p] = _product_transpose


def product(
    form: str,
    result: int,
    *operands: jax.Array,
    rows: int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """One of the products of a sparse matrix.

    Args:
      form: "ell" or "coo".
      result: VALUES, LEFT or RIGHT, the operand of the form of which this is the gradient.
      *operands: positions, int32 [*B,i,p] of columns for ELL, or [*B,n] of rows and [*B,n] of
        columns for COO; then the two other operands of the form, values before left before right:
        float [*B,...] of one dtype.
      rows: how many rows the result has; None for values.
      implementation: a backend by name, or None to choose.

    Returns:
      The values, shaped as the positions, or [*B,rows,d].

    Raises:
      NotImplementedError: the backend named cannot serve this.
    """
    entry_axes = 2 if form == "ell" else 1
    return _bind(
        _product_p,
        *operands,
        form=form,
        result=result,
        rows=rows,
        implementation=implementation,
        leading=operands[0].ndim - entry_axes,
    )[0]


def _is_float(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def _function_shapes(*operands, results, leading, **params):
    dispatch.choose(operands=operands, leading=leading, **params)
    batch = operands[0].shape[:leading]
    return [((*batch, *trailing), dtype) for trailing, dtype in results]


def _function(*operands, results, sizes, **params):
    del results
    return list(dispatch.run(operands=operands, sizes=dict(sizes), **params))


def _gradient_shapes(*arrays, results, leading, **params):
    dispatch.choose(operands=arrays, leading=leading, gradient=True, **params)
    operands = arrays[: -len(results) - 1]
    return [(x.shape, x.dtype) for x in operands if _is_float(x)]


def _gradient(*arrays, results, sizes, **params):
    del results
    return list(dispatch.run(operands=arrays, sizes=dict(sizes), gradient=True, **params))


def _meaning(operands, operation, sizes):
    """The first result of a function in plain JAX, of its float operands; and these."""
    reference = functools.partial(dispatch.reference(operation), **dict(sizes))

    def result(*floats):
        floats = iter(floats)
        return reference(*(next(floats) if _is_float(x) else x for x in operands))[0]

    return result, [x for x in operands if _is_float(x)]


def _plain_gradient(*arrays, operation, sizes, results, **_):
    result, floats = _meaning(arrays[: -len(results) - 1], operation, sizes)
    return list(jax.vjp(result, *floats)[1](arrays[-1]))


def _split_tangents(arrays, results):
    """Operands and results, and the tangents of the float operands."""
    count = (sum(map(_is_float, arrays)) - len(results)) // 2
    return arrays[: len(arrays) - count], arrays[len(arrays) - count :]


def _tangent(*arrays, operation, sizes, results, **_):
    known, tangents = _split_tangents(arrays, results)
    result, floats = _meaning(known[: -len(results)], operation, sizes)
    return [jax.jvp(result, floats, list(tangents))[1]]


def _tangent_shapes(*arrays, results, leading, **_):
    trailing, dtype = results[0]
    return [((*arrays[0].shape[:leading], *trailing), dtype)]


_function_p = _primitive("sparse_function", _function, _function_shapes)
_gradient_p = _primitive("sparse_function_gradient", _gradient, _gradient_shapes)
_tangent_p = _primitive("sparse_function_tangent", _tangent, _tangent_shapes)


def _function_jvp(primals, tangents, **params):
    out = _bind(_function_p, *primals, **params)
    tangents = [
        ad.instantiate_zeros(t) for x, t in zip(primals, tangents, strict=True) if _is_float(x)
    ]
    # The other results are for the gradient alone, and have none.
    others = [ad.Zero(jax.typeof(x)) for x in out[1:]]
    return out, [*_bind(_tangent_p, *primals, *out, *tangents, **params), *others]


def _plain_jvp(plain, primals, tangents, **params):
    """Of a derivative: that of its meaning in the arrays that move."""
    moving = [n for n, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]

    def function(*arrays):
        full = list(primals)
        for n, array in zip(moving, arrays, strict=True):
            full[n] = array
        return plain(*full, **params)

    return jax.jvp(function, [primals[n] for n in moving], [tangents[n] for n in moving])


def _tangent_transpose(cotangents, *arrays, results, **params):
    (cotangent,) = cotangents
    if isinstance(cotangent, ad.Zero):
        return [None] * len(arrays)
    avals = [x.aval if ad.is_undefined_primal(x) else x for x in arrays]
    known = arrays[: len(_split_tangents(avals, results)[0])]
    gradients = _bind(_gradient_p, *known, cotangent, results=results, **params)
    unknown = map(ad.is_undefined_primal, arrays[len(known) :])
    return [None] * len(known) + [
        x if own else None for x, own in zip(gradients, unknown, strict=True)
    ]


def _gradient_transpose(cotangents, *arrays, **params):
    """The gradient is linear in the cotangent of the result, its last argument."""
    cotangents = [ad.instantiate_zeros(x) for x in cotangents]
    return [None] * (len(arrays) - 1) + _bind(_tangent_p, *arrays[:-1], *cotangents, **params)


ad.primitive_jvps[_function_p] = _function_jvp
ad.primitive_jvps[_gradient_p] = functools.partial(_plain_jvp, _plain_gradient)
ad.primitive_jvps[_tangent_p] = functools.partial(_plain_jvp, _tangent)
ad.primitive_transposes[_tangent_p] = _tangent_transpose
ad.primitive_transposes[_gradient_p] = _gradient_transpose


def function(
    operation: str,
    *operands: jax.Array,
    leading: int,
    results: Sequence[tuple[Sequence[int], Any]],
    implementation: str | None = None,
    **sizes: Any,
) -> jax.Array:
    """A function of `dispatch.SERVES`.

    Args:
      operation: its name.
      *operands: arrays [*B,...].
      leading: how many batch axes *B there are.
      results: of each array that it returns, the shape behind *B and the dtype. The first is the
        result; others are what its gradient takes besides the operands.
      implementation: a backend by name, or None to choose.
      **sizes: its static keywords.

    Returns:
      The result, [*B,...].

    Raises:
      NotImplementedError: the backend named cannot serve this.
    """
    hashable = tuple((tuple(shape), jnp.dtype(dtype)) for shape, dtype in results)
    return _bind(
        _function_p,
        *operands,
        operation=operation,
        results=hashable,
        sizes=tuple(sizes.items()),
        implementation=implementation,
        leading=leading,
    )[0]
