"""The hyperlayer's part of a training step of glimpses, against the network around it.

The bar: reading, from sampling to contraction, takes at most half as long (a speedup of 2).
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import report
from benchmarks.accuracy import in_float32
from benchmarks.contenders import Contender
from benchmarks.timing import compare
from hyperlayer_jax import IndexTuples, RowSparseTensor, contract, discretize
from train.glimpse import Config, make_model

_CONFIGS = {
    "default": Config(),
    "default, 4 local points": Config(num_local=4),
    "28x28 of 60x60": Config(digit_size=28, canvas=60, coarseness=4, glimpse_size=16, hidden=512),
    "convolutional head": Config(head="conv"),
}


def cases(small: bool = False) -> Iterator[dict[str, Any]]:
    """A row of each configuration, or of the first."""
    for name, config in list(_CONFIGS.items())[: 1 if small else None]:
        model = make_model(config, 1)
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        shape = (config.batch_size, config.canvas, config.canvas, 1)
        images = jax.random.uniform(jax.random.key(0), shape)
        seen = model.attention(images, model.features(images))

        def read(means, sigmas, key, images, config=config):
            """What `GlimpseAttention` does once it has decided."""
            b, *out_shape, r = means.shape
            rows = (b, math.prod(out_shape), 1)
            tuples = IndexTuples(
                means.reshape(*rows, r),
                jnp.broadcast_to(sigmas[:, :, None, None], means.shape).reshape(*rows, r),
                jnp.ones(rows),
            )
            in_shape = images.shape[1:3]
            indices, values = discretize(
                key, tuples, in_shape, num_local=config.num_local, region=config.region
            )
            return contract(RowSparseTensor(indices, values, tuple(out_shape), in_shape), images)

        def decide_and_classify(params, patches, images, graphdef=graphdef, rest=rest):
            model = nnx.merge(graphdef, params, rest, copy=True)
            decided = model.attention.aim.linear(model.features(images))
            return jnp.concatenate([decided, model.classify(patches)], -1)

        key = jax.random.key(1)
        reading = Contender(read, (seen.means, seen.sigmas, key, images), (0, 1))
        around = Contender(decide_and_classify, (params, seen.patches, images), (0, 1), same=False)
        yield from compare(
            name,
            {
                "reading": reading.with_gradients(),
                "network around it": around.with_gradients(),
            },
            expected=in_float32(reading.with_gradients()),
        )


if __name__ == "__main__":
    report.main(glimpse=cases)
