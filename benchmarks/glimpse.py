"""Steps of glimpses: what the hyperlayer's part takes, and what finding takes on large canvases.

`glimpse`: reading, from sampling to contraction, against the network around it; the bar is at most
half as long (a speedup of 2). `finding`: a step on canvases of 60 to 1500, which are surveyed
beforehand, where data is made, against the same on canvases of 126 (the bar is a speedup of 1 / 1.3
where the 256 busiest cells are scored) and against convolutions, as far as they go.
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
from train.finding import survey
from train.glimpse import Config, make_model

_CONFIGS = {
    "14x14 of 32x32": Config(model="box", canvas=32, coarseness=2),
    "the same, 4 local points": Config(model="box", canvas=32, coarseness=2, num_local=4),
    "28x28 of 60x60": Config(
        model="box", digit_size=28, canvas=60, coarseness=4, glimpse_size=16, hidden=512
    ),
    "convolutional head": Config(model="box", canvas=32, coarseness=2, head="conv"),
}
_SIZES = (60, 126, 252, 510, 1500)
_COMPARED = 126
# What convolutions over the whole canvas have time and memory for.
_LARGEST_CONV = 256
# Canvases of 1500 in a batch of 64 would fill half a gigabyte.
_BATCH = 8


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


def finding(small: bool = False) -> Iterator[dict[str, Any]]:
    """Canvases of which all cells of 6 x 6 pixels are scored, or only the 256 busiest."""
    for size in _SIZES[: 1 if small else None]:
        for scored in (0, 256) if size > _SIZES[0] else (0,):
            steps = {
                f"{size}": _find(size, scored),
                f"{_COMPARED}": _find(_COMPARED, scored),
            }
            if size <= _LARGEST_CONV and not scored:
                steps["convolutions"] = _convolve(size)
            yield from compare(f"{size} x {size}, {scored or 'all'} cells", steps)


def _find(size, scored):
    config = Config(canvas=size, coarseness=6, scored=scored)
    images = jax.random.uniform(jax.random.key(0), (_BATCH, size, size, 1))
    graphdef, params, rest = nnx.split(make_model(config, 1), nnx.Param, ...)
    known = survey(images, config.coarseness, scored)

    def find(params, images, known):
        model = nnx.merge(graphdef, params, rest, copy=True)
        return model.look(images, known)[0].mean()

    return Contender(find, (params, images, known), (0,), same=False).with_gradients()


def _convolve(size):
    images = jax.random.uniform(jax.random.key(0), (_BATCH, size, size, 1))
    graphdef, params = nnx.split(make_model(Config(model="pool", canvas=size), 1))

    def convolve(params, images):
        return nnx.merge(graphdef, params)(images)[0].mean()

    return Contender(convolve, (params, images), (0,), same=False).with_gradients()


if __name__ == "__main__":
    report.main(glimpse=cases, finding=finding)
