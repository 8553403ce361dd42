"""Language models of bytes by pattern of attention: equal data and steps, seeds side by side.

Layers add nothing at first, with whatever pattern (`--noquiet` for the usual start).

  python -m benchmarks.language --layers=wc,wd,wl --length=1024 --seeds=3
"""

import dataclasses
import functools
import json

import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from benchmarks import command, seeds
from hyperlayer_jax.nn.patterns import PATTERNS
from train import language, text, transformer_config
from train.data import DataError


def main(argv):
    """Trains and tests models of all layers and seeds."""
    del argv
    given, cases = flags.FLAGS, []
    names = "corpus", "length", "window", "features", "steps", "batch_size", "learning_rate"
    options = {name: getattr(given, name) for name in names}
    try:
        corpus = text.load(given.corpus)
        parts = [_spread(part, given) for part in (corpus.validation, corpus.test)]
        configs = [_config(layers, options) for layers in given.layers]
    except (DataError, ValueError) as error:
        raise app.UsageError(error) from error
    print(f"{given.corpus}: sha256 {corpus.sha256}", flush=True)
    for config in configs:
        models = [_model(dataclasses.replace(config, seed=seed)) for seed in range(given.seeds)]
        for step, _, states, ms in seeds.train(
            models,
            language.make_optimizer(config),
            functools.partial(language.loss_fn, config),
            jnp.asarray(corpus.train),
            seed=0,
            steps=given.steps,
            every=given.every,
        ):
            for model, state in zip(models, states, strict=True):
                nnx.update(model, state)
            windows = parts[step == given.steps]
            bits = [language.bits_per_byte(model, windows) for model in models]
            part = "test" if step == given.steps else "validation"
            case = {"name": f"{config.layers}, {part}, step {step}", "bits_per_byte": bits}
            cases.append({**case, "ms": ms})
            listed = ", ".join(f"{x:.4f}" for x in bits)
            print(f"{case['name']}: {listed}; mean {np.mean(bits):.4f}; {ms:.4g} ms", flush=True)
    print(json.dumps({"corpus": given.corpus, "sha256": corpus.sha256, "cases": cases}))


def _spread(part, given):
    """Windows from all over a part of the text."""
    windows = text.windows(part, given.length, len(part))
    count = min(len(windows), max(1, given.test_bytes // given.length))
    return windows[np.arange(count) * len(windows) // count]


def _config(layers, options):
    """Without the width of a window where no layer has one."""
    windowed = {pattern.letter for pattern in PATTERNS.values() if hasattr(pattern, "window")}
    if windowed.isdisjoint(layers):
        options = {name: value for name, value in options.items() if name != "window"}
    return transformer_config.Config(layers=layers, **options)


def _model(config):
    model = transformer_config.make_model(config)
    return transformer_config.quieted(model) if flags.FLAGS.quiet else model


if __name__ == "__main__":
    flags.DEFINE_list("layers", ["wc", "wd", "wl"], "Of each model, see train.transformer.")
    flags.register_validator("layers", bool, "want letters, with commas between models")
    flags.DEFINE_string("corpus", "stdlib", "See train.transformer.")
    flags.DEFINE_bool("quiet", True, "Layers add nothing at first.")
    flags.DEFINE_integer("seeds", 1, "Models of each kind.", lower_bound=1)
    flags.DEFINE_integer("length", 1024, "Bytes of an example.", lower_bound=2)
    flags.DEFINE_integer("window", 16, "Bytes that a window sees.", lower_bound=1)
    flags.DEFINE_integer("features", 64, "Width of the model.", lower_bound=1)
    flags.DEFINE_integer("steps", 200, "Updates.", lower_bound=1)
    flags.DEFINE_integer("every", 100, "Updates until it is looked at.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 2, "Examples in an update.", lower_bound=1)
    flags.DEFINE_integer("test_bytes", 2**16, "To look at, and to report on.", lower_bound=2)
    flags.DEFINE_float("learning_rate", 3e-3, "At its highest.", lower_bound=0.0)
    command.run(main)
