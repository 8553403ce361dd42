"""The adaptive sparse hyperlayer as a module."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from hyperlayer_jax import checks
from hyperlayer_jax.hyperlayer import apply_template, discretize, round_tuples
from hyperlayer_jax.kernels import serving
from hyperlayer_jax.tensors import contract
from hyperlayer_jax.types import IndexTuples, RowSparseTensor, SparseTensor


class HyperLayer(nnx.Module):
    """Multiplies its input by a sparse tensor that a hypernetwork emits for that input.

    y = W(x) x + b, where W [*out_shape, *in_shape] is only known by index tuples (equation 1 of
    docs/method.md). In training, W is sampled around the means; where deterministic, the means
    are rounded.

    Three kinds of template decide which columns of W's index tuples are learned:

    - None: all of them, those of the output before those of the input. The hypernetwork returns
      means [*B, *chunks, k, R], R = len(out_shape) + len(in_shape).
    - "output": every output owns k entries, so only the input's columns are learned: means
      [*B, rows, k, len(in_shape)], rows = prod(out_shape). Contracted without a scatter.
    - int32 [*chunks, R] with `columns`: each chunk has fixed coordinates, but for its `columns`:
      means [*B, *chunks, k, len(columns)].
    """

    def __init__(
        self,
        hypernetwork: Callable[[jax.Array], IndexTuples],
        out_shape: Sequence[int],
        in_shape: Sequence[int],
        *,
        template: str | jax.Array | None = None,
        columns: Sequence[int] | None = None,
        num_feature_axes: int = 0,
        num_global: int = 0,
        num_local: int = 0,
        region: int | Sequence[int] | None = None,
        use_bias: bool = False,
        implementation: str | None = None,
        deterministic: bool = False,
        rngs: nnx.Rngs,
    ):
        """Makes the layer.

        Args:
          hypernetwork: maps x [*B, *in_shape, *D] to `IndexTuples` as above.
          out_shape: the axes of the output.
          in_shape: the axes of the input that are summed over.
          template: see the class.
          columns: the learned columns of an array template.
          num_feature_axes: how many axes *D of x there are behind those of in_shape.
          num_global: points per tuple drawn from the whole space.
          num_local: points per tuple drawn from the region.
          region: the axes of the region around a mean; needed when num_local > 0.
          use_bias: adds a learned [*out_shape], 0 at first.
          implementation: the kernel backend for what it serves, chosen by device where None.
          deterministic: rounds the means; `nnx.view(model, deterministic=True)` for evaluation.
          rngs: the stream `sample` draws points.

        Raises:
          ValueError: a shape or the template is out of range.
        """
        self.out_shape = checks.check_shape("out_shape", out_shape)
        self.in_shape = checks.check_shape("in_shape", in_shape)
        if isinstance(template, str) and template != "output":
            raise ValueError(f'template: got {template!r}, want None, "output" or an int32 array')
        self.by_output = isinstance(template, str)
        array = None if isinstance(template, str) else template
        if (array is None) != (columns is None):
            raise ValueError("columns: wanted with an array as template, and only then")
        width = len(self.out_shape + self.in_shape)
        self.columns = None if columns is None else checks.check_columns("columns", columns, width)
        if array is not None:
            checks.check_indices("template", array, 1, "[*chunks, R]")
            if array.shape[-1] != width:
                raise ValueError(f"template: got {array.shape[-1]} columns, want {width}")
        self.template: jax.Array | None = nnx.data(array)
        self.hypernetwork = hypernetwork
        self.num_feature_axes = checks.check_count("num_feature_axes", num_feature_axes)
        self.num_global = checks.check_count("num_global", num_global)
        self.num_local = checks.check_count("num_local", num_local)
        if self.num_local and region is None:
            raise ValueError("region: got None, want the axes of the region when num_local > 0")
        self.region = region
        self.implementation = implementation
        self.bias = nnx.Param(jnp.zeros(self.out_shape)) if use_bias else nnx.data(None)
        self.deterministic = deterministic
        self.rngs = rngs["sample"].fork()

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [*B, *in_shape, *D] to [*B, *out_shape, *D]."""
        checks.check_float(
            "x", x, len(self.in_shape) + self.num_feature_axes, "[*B, *in_shape, *D]"
        )
        num_batch_axes = x.ndim - len(self.in_shape) - self.num_feature_axes
        tensor = self.tensor(self.hypernetwork(x), num_batch_axes, x.dtype)
        operation = "ell_spmm" if self.by_output else "spmm"
        y = contract(tensor, x, implementation=serving(self.implementation, operation))
        if self.bias is None:
            return y
        return y + self.bias[...].astype(y.dtype).reshape(
            (1,) * num_batch_axes + self.out_shape + (1,) * self.num_feature_axes
        )

    def tensor(
        self, tuples: IndexTuples, num_batch_axes: int, dtype: jnp.dtype
    ) -> SparseTensor | RowSparseTensor:
        """Samples tuples, or rounds them, into the sparse tensor W of leading axes *B."""
        num_out = len(self.out_shape)
        shape = self.out_shape + self.in_shape
        columns = tuple(range(num_out, len(shape))) if self.by_output else self.columns
        space = shape if columns is None else tuple(shape[c] for c in columns)
        if self.deterministic:
            indices, values = round_tuples(tuples, space)
        else:
            indices, values = discretize(
                self.rngs(),
                tuples,
                space,
                num_global=self.num_global,
                num_local=self.num_local,
                region=self.region,
                implementation=serving(self.implementation, "redistribute"),
            )
        values = values.astype(dtype)
        if self.by_output:
            return RowSparseTensor(indices, values, self.out_shape, self.in_shape)
        batch, chunks = values.shape[:num_batch_axes], values.shape[num_batch_axes:-1]
        if columns is not None and self.template is not None:
            template = jnp.broadcast_to(self.template, (*batch, *chunks, len(shape)))
            indices = apply_template(template, indices, columns=columns)
        num_entries = math.prod(values.shape[num_batch_axes:])
        return SparseTensor(
            indices.reshape(*batch, num_entries, len(shape)),
            values.reshape(*batch, num_entries),
            self.out_shape,
            self.in_shape,
        )

    def set_view(self, *, deterministic: bool | None = None):
        """Called by `nnx.view`.

        Args:
          deterministic: rounds the means instead of sampling around them.
        """
        if deterministic is not None:
            self.deterministic = deterministic
