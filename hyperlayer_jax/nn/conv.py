"""Convolution with learned taps: few weights, anywhere in a large field."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from hyperlayer_jax import checks, kernels
from hyperlayer_jax.nn.candidates import num_candidates, unravel
from hyperlayer_jax.nn.exploring import explore
from hyperlayer_jax.nn.tuples import FixedTuples, PlacedTuples
from hyperlayer_jax.types import RowSparseTensor


class SparseConv(nnx.Module):
    """A convolution in which every output channel has a few taps, and learns where they are.

    A tap is an input channel, a place in the field, and a weight. As those of `SparseLinear`, taps
    sit at integer places and `jumps` moves them; training computes what evaluation does. Time and
    memory are those of the taps, not of the field, and no kernel of its size is formed.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_tuples: int,
        field: Sequence[int],
        *,
        strides: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        padding: str = "SAME",
        groups: int = 1,
        use_bias: bool = True,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        """Makes the layer.

        Args:
          in_features: channels of the input.
          out_features: channels of the output.
          num_tuples: k, the taps of each output channel.
          field: the axes of the field that taps lie in, one for each axis of the image.
          strides: input pixels from one output pixel to the next.
          dilation: input pixels from one place of the field to the next.
          padding: "SAME" or "VALID", as in `nnx.Conv`.
          groups: parts of the channels; outputs only see the inputs of their part.
          use_bias: adds a learned [out_features], 0 at first.
          implementation: the kernel backend for what it serves, chosen by device where None.
          rngs: the stream `params`.

        Raises:
          ValueError: a size is out of range, or there are more taps than places.
        """
        self.field = checks.check_shape("field", field)
        rank = len(self.field)
        self.strides = checks.check_shape("strides", _each(strides, rank), rank)
        self.dilation = checks.check_shape("dilation", _each(dilation, rank), rank)
        if padding not in ("SAME", "VALID"):
            raise ValueError(f'padding: got {padding!r}, want "SAME" or "VALID"')
        if groups < 1 or in_features % groups or out_features % groups:
            raise ValueError(
                f"groups: got {groups}, want a divisor of in_features = {in_features} and "
                f"out_features = {out_features}"
            )
        self.padding = padding
        self.groups = groups
        self.implementation = implementation
        self.in_features, self.out_features = in_features, out_features
        space = (in_features // groups, *self.field)
        scale = checks.check_positive("num_tuples", num_tuples) ** -0.5
        self.tuples: FixedTuples = PlacedTuples(
            (out_features,), num_tuples, space, scale=scale, rngs=rngs
        )
        self.bias = nnx.Param(jnp.zeros(out_features)) if use_bias else nnx.data(None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [*B, *image, in_features] to [*B, *image, out_features], of x's dtype."""
        rank = len(self.field)
        checks.check_float("x", x, rank + 1, "[*B, *image, in_features]")
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x: got {x.shape[-1]} channels, want {self.in_features}")
        x = jnp.asarray(x)
        batch, image = x.shape[: -rank - 1], x.shape[-rank - 1 : -1]
        window = tuple((f - 1) * d + 1 for f, d in zip(self.field, self.dilation, strict=True))
        pads = jax.lax.padtype_to_pads(image, window, self.strides, self.padding)
        out_image = tuple(
            (size + sum(pad) - extent) // stride + 1
            for size, pad, extent, stride in zip(image, pads, window, self.strides, strict=True)
        )
        if min(out_image) < 1:
            raise ValueError(f"x: got an image of {image}, want at least {window} pixels")
        # The batch travels as the last axis: a tap then reads whole rows.
        implementation = kernels.serving(self.implementation, "ell_spmm")
        flat = x.reshape(math.prod(batch), math.prod(image) * self.in_features).T
        look_up = functools.partial(self._inputs, image, out_image, [low for low, _ in pads])
        values = self.tuples.values[...].astype(x.dtype)
        rows = (*out_image, *values.shape)
        entries = jnp.broadcast_to(values, rows)
        y = kernels.ell_spmm(
            look_up(self.tuples.indices()),
            entries.reshape(math.prod(rows[:-1]), values.shape[-1]),
            flat,
            implementation=implementation,
        )
        if isinstance(self.tuples, PlacedTuples):
            propose = functools.partial(_propose, look_up, self.tuples.shape, implementation)
            y = explore(propose, self.tuples, flat, y)
        y = y.T.reshape(*batch, *out_image, self.out_features)
        if self.bias is None:
            return y
        return y + jnp.expand_dims(self.bias[...].astype(y.dtype), range(y.ndim - 1))

    def _inputs(self, image, out_image, pads, taps):
        """Which entry of the image [*image, in_features] each output reads at taps [out, c, 1 + r].

        Returns int32 [prod(out_image) * out_features, c], -1 where that lies outside of the image.
        """
        rank = len(image)
        index, inside = 0, True
        for axis, size in enumerate(image):
            start = jnp.arange(out_image[axis], dtype=jnp.int32) * self.strides[axis] - pads[axis]
            start = jnp.expand_dims(start, [a for a in range(rank + 2) if a != axis])
            offset = taps[..., 1 + axis] * self.dilation[axis]
            place = start + jnp.expand_dims(offset, range(rank))
            inside = inside & (place >= 0) & (place < size)
            index = index * size + place
        group = jnp.arange(self.out_features, dtype=jnp.int32) * self.groups // self.out_features
        channel = taps[..., 0] + (group * (self.in_features // self.groups))[:, None]
        channel = jnp.expand_dims(channel, range(rank))
        index = jnp.where(inside, index * self.in_features + channel, -1)
        return index.reshape(-1, taps.shape[1])

    def weight(self) -> RowSparseTensor:
        """The taps as a sparse tensor [out_features, in_features / groups, *field]."""
        tuples = self.tuples
        return RowSparseTensor(
            tuples.indices(), tuples.values[...], (self.out_features,), tuples.shape
        )


def _propose(look_up, space, implementation, key, places, x, dy):
    """Candidates int32 [out, c, 1 + r], any taps, and their gradients."""
    out, k, _ = places.shape
    flat = jax.random.randint(key, (out, num_candidates(k)), 0, math.prod(space), jnp.int32)
    candidates = unravel(flat, space)
    gradients = kernels.ell_sddmm(look_up(candidates), dy, x, implementation=implementation)
    return candidates, gradients.reshape(-1, *flat.shape).sum(0)


def _each(sizes, rank):
    return (sizes,) * rank if isinstance(sizes, int) else tuple(sizes)
