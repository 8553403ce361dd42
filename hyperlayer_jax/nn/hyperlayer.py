"""The adaptive sparse hyperlayer as a module."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from hyperlayer_jax import checks
from hyperlayer_jax.hyperlayer import apply_template
from hyperlayer_jax.kernels import serving
from hyperlayer_jax.nn.sampler import Sampler
from hyperlayer_jax.tensors import contract
from hyperlayer_jax.types import IndexTuples, RowSparseTensor, SparseTensor


class HyperLayer(nnx.Module):
    """Multiplies its input by a sparse tensor that a hypernetwork emits for that input.

    y = W(x) x + b, where W [*out_shape, *in_shape] is only known by index tuples (equation 1 of
    docs/method.md). In training, W is sampled around the means; where deterministic, the means
    are rounded.

    Which columns of W's index tuples are learned is one of three:

    - all of them, those of the output before those of the input. The hypernetwork returns means
      [*B, *chunks, k, R], R = len(out_shape) + len(in_shape).
    - `by_output`: every output owns k entries, so only the input's columns are learned: means
      [*B, rows, k, len(in_shape)], rows = prod(out_shape). Contracted without a scatter.
    - `template`, int32 [*chunks, R], with `columns`: each chunk has fixed coordinates, but for its
      `columns`: means [*B, *chunks, k, len(columns)].

    `AdaptiveTuples` is a ready hypernetwork.
    """

    def __init__(
        self,
        hypernetwork: Callable[[jax.Array], IndexTuples],
        in_shape: int | Sequence[int],
        out_shape: int | Sequence[int],
        *,
        by_output: bool = False,
        template: jax.Array | None = None,
        columns: Sequence[int] | None = None,
        num_feature_axes: int = 0,
        sampler: Sampler | None = None,
        use_bias: bool = False,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        """Makes the layer.

        Args:
          hypernetwork: maps x [*B, *in_shape, *D] to `IndexTuples` as above.
          in_shape: the axes of the input that are summed over.
          out_shape: the axes of the output.
          by_output: see the class.
          template: see the class.
          columns: the learned columns of a template.
          num_feature_axes: how many axes *D of x there are behind those of in_shape.
          sampler: of points; where None, `Sampler(evaluation="round", rngs=rngs)`.
          use_bias: adds a learned [*out_shape], 0 at first.
          implementation: the kernel backend for what it serves, chosen by device where None.
          rngs: the stream `sample`, for a sampler of its own.

        Raises:
          ValueError: a shape or the template is out of range.
        """
        self.in_shape, self.out_shape = axes("in_shape", in_shape), axes("out_shape", out_shape)
        if (template is None) != (columns is None):
            raise ValueError("columns: wanted with a template, and only then")
        num_out, width = len(self.out_shape), len(self.out_shape + self.in_shape)
        if template is not None:
            if by_output:
                raise ValueError("by_output: got True, want no template then")
            checks.check_indices("template", template, 1, "[*chunks, R]")
            if template.shape[-1] != width:
                raise ValueError(f"template: got {template.shape[-1]} columns, want {width}")
        if columns is None:
            columns = range(num_out if by_output else 0, width)
        self.columns = checks.check_columns("columns", columns, width)
        self.by_output = by_output
        self.template: jax.Array | None = nnx.data(template)
        self.hypernetwork = hypernetwork
        self.num_feature_axes = checks.check_count("num_feature_axes", num_feature_axes)
        self.sampler = Sampler(evaluation="round", rngs=rngs) if sampler is None else sampler
        self.implementation = implementation
        self.bias = nnx.Param(jnp.zeros(self.out_shape)) if use_bias else nnx.data(None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [*B, *in_shape, *D] to [*B, *out_shape, *D]."""
        tensor = self.weight(x)
        operation = "ell_spmm" if self.by_output else "spmm"
        y = contract(tensor, x, implementation=serving(self.implementation, operation))
        if self.bias is None:
            return y
        bias = self.bias[...].astype(y.dtype)
        batch = range(y.ndim - bias.ndim - self.num_feature_axes)
        return y + jnp.expand_dims(bias, (*batch, *range(-self.num_feature_axes, 0)))

    def weight(self, x: jax.Array) -> SparseTensor | RowSparseTensor:
        """The sparse tensor W(x) [*B, *out_shape, *in_shape] for x [*B, *in_shape, *D].

        In training it is drawn anew by every call; where deterministic, it is that of evaluation.
        """
        num_batch_axes = check_input(x, self.in_shape, self.num_feature_axes)
        tuples = self.hypernetwork(x)
        if not isinstance(tuples, IndexTuples):
            raise ValueError(f"hypernetwork: got a {type(tuples).__name__}, want IndexTuples")
        shape = self.out_shape + self.in_shape
        space = tuple(shape[column] for column in self.columns)
        # By name: `nnx.tabulate` takes no dataclass by position.
        indices, values = self.sampler(
            tuples=tuples, shape=space, implementation=self.implementation
        )
        values = values.astype(x.dtype)
        if self.by_output:
            return RowSparseTensor(indices, values, self.out_shape, self.in_shape)
        batch, chunks = values.shape[:num_batch_axes], values.shape[num_batch_axes:-1]
        if self.template is not None:
            template = jnp.broadcast_to(self.template, (*batch, *chunks, len(shape)))
            indices = apply_template(template, indices, columns=self.columns)
        num_entries = math.prod(values.shape[num_batch_axes:])
        return SparseTensor(
            indices.reshape(*batch, num_entries, len(shape)),
            values.reshape(*batch, num_entries),
            self.out_shape,
            self.in_shape,
        )


def axes(name: str, shape: int | Sequence[int]) -> tuple[int, ...]:
    """A shape, which may be given as its only axis, as a tuple."""
    return checks.check_shape(name, (shape,) if isinstance(shape, int) else shape)


def check_input(x: jax.Array, in_shape: tuple[int, ...], num_feature_axes: int = 0) -> int:
    """Wants x to be floating [*B, *in_shape, *D]; returns the number of axes *B."""
    want = ", ".join(map(str, ("*B", *in_shape)))
    want = f"[{want}, *D], *D {num_feature_axes} axes" if num_feature_axes else f"[{want}]"
    num_axes = len(in_shape) + num_feature_axes
    checks.check_float("x", x, num_axes, want)
    num_batch_axes = x.ndim - num_axes
    if tuple(x.shape[num_batch_axes : num_batch_axes + len(in_shape)]) != in_shape:
        raise ValueError(f"x: got shape {x.shape}, want {want}")
    return num_batch_axes
