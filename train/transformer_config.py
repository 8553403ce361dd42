"""What `train.transformer` can be told, and the model that this describes."""

import dataclasses
import functools
import math
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax import nnx

from hyperlayer_jax.nn import TransformerLM
from hyperlayer_jax.nn.pattern import Pattern
from hyperlayer_jax.nn.patterns import PATTERNS, Content
from train import launcher, text
from train.sequences import DividedAttention

# What each task begins with.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "text": {
        "layers": "wwwl", "positions": "rotary", "length": 256, "features": 128, "num_heads": 4,
        "num_tuples": 4, "num_global": 2, "steps": 1000, "learning_rate": 3e-3, "window": 8,
    },
    "offset": {
        "layers": "s", "positions": "none", "features": 32, "num_heads": 1, "num_tuples": 2,
        "num_global": 32, "steps": 4000, "learning_rate": 1e-2, "window": 8,
    },
    "recall": {
        "layers": "wc", "positions": "rotary", "length": 256, "features": 64, "num_heads": 4,
        "num_tuples": 4, "num_global": 4, "steps": 3000, "learning_rate": 3e-3, "window": 16,
    },
}  # fmt: skip
NUM_TOKENS = {"text": text.NUM_BYTES, "offset": 64, "recall": 512}


def _by_task(name: str, help: str, **options: Any) -> Any:
    """A flag whose default goes by the task."""
    values = [f"{defaults[name]} for {task}" for task, defaults in _DEFAULTS.items()]
    return launcher.flag(
        lambda config: _DEFAULTS[config.task][name],
        f"{help} By default {', '.join(values)}.",
        **options,
    )


def _length(config: "Config") -> int:
    quarter_more = 64 * math.ceil(1.25 * config.offset / 64)
    return _DEFAULTS[config.task].get("length", quarter_more)


def _with(option: str) -> dict[str, Any]:
    """That one of the layers has a pattern with this option."""
    letters = {pattern.letter for pattern in PATTERNS.values() if hasattr(pattern, option)}
    return {"layers": lambda layers: not letters.isdisjoint(layers)}


@dataclasses.dataclass(frozen=True)
class Config(launcher.Config):
    """What to predict, and with what."""

    has_sequences: ClassVar[bool] = True
    # Dense attention is that of JAX.
    kernels_only: ClassVar[dict[str, Any]] = {"layers": lambda layers: set(layers) != {"d"}}

    task: Literal["text", "offset", "recall"] = launcher.flag("text", "What to predict.")
    corpus: str = launcher.flag(
        "stdlib",
        "stdlib (the sources of Python's standard library), a text file, a folder of them, or the "
        "name of a set of tensorflow-datasets with a feature called text.",
        only={"task": ["text"]},
    )
    data_dir: str | None = launcher.flag(
        None, "Where tensorflow-datasets keeps its sets.", only={"task": ["text"]}, fixed=False
    )
    offset: int = launcher.flag(
        100, "How far back the offset task asks.", minimum=1, below=2**24, only={"task": ["offset"]}
    )
    pairs: int = launcher.flag(
        64,
        "Pairs of key and value that the recall task asks for.",
        minimum=1,
        below=NUM_TOKENS["recall"] // 2 + 1,
        only={"task": ["recall"]},
    )
    layers: str = _by_task(
        "layers",
        "A letter for each layer: "
        + ", ".join(f"{pattern.letter} {name}" for name, pattern in PATTERNS.items())
        + ".",
    )
    positions: Literal["rotary", "learned", "none"] = _by_task(
        "positions", "How layers know the place of a token."
    )
    length: int = launcher.flag(
        _length,
        "Tokens in an example. By default 256 for text and recall, and for the offset task a "
        "quarter more than the offset, in multiples of 64.",
        minimum=2,
        below=2**24,
    )
    features: int = _by_task("features", "Width of the model.", minimum=1, below=2**16)
    num_heads: int = _by_task("num_heads", "Heads of attention.", minimum=1, below=2**12)
    num_tuples: int = _by_task(
        "num_tuples",
        "Learned positions per token and head.",
        minimum=1,
        below=2**12,
        only=_with("num_tuples"),
    )
    num_global: int = _by_task(
        "num_global",
        "Points per position drawn from all.",
        minimum=0,
        below=2**16,
        only=_with("num_tuples"),
    )
    num_local: int = launcher.flag(
        2, "Points per position drawn near it.", minimum=0, below=2**16, only=_with("num_tuples")
    )
    region: int = launcher.flag(
        8,
        "Positions that count as near.",
        minimum=1,
        only=_with("num_tuples") | {"num_local": bool},
    )
    window: int = _by_task("window", "Tokens that a window sees.", minimum=1, only=_with("window"))
    stride: int = launcher.flag(
        8,
        "One token in so many looks back in a strided layer.",
        minimum=1,
        only=_with("stride"),
    )
    block: int = launcher.flag(32, "Tokens in a block.", minimum=1, only=_with("block"))
    dropout: float = launcher.flag(
        0.0, "Share of outputs dropped in training.", minimum=0.0, below=1
    )
    bfloat16: bool = launcher.flag(False, "Computes in bfloat16.")
    steps: int = _by_task("steps", "Number of updates.", minimum=1)
    batch_size: int = launcher.flag(8, "Examples in an update.", minimum=1, below=2**20)
    learning_rate: float = _by_task("learning_rate", "Highest step size.", above=0)
    warmup: int = launcher.flag(
        100, "Updates until the step size is highest; a tenth of --steps at most.", minimum=0
    )
    clip: float = launcher.flag(1.0, "Largest norm of a gradient.", above=0)
    temperature: float = launcher.flag(
        0.7, "Of the continuations that are drawn.", minimum=0.0, only={"task": ["text"]}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.num_tuples > self.length:
            raise ValueError(
                f"--num_tuples must be at most --length={self.length}, got {self.num_tuples}"
            )
        parts = (self.mesh_shape() or {}).get("seq", 1)
        if self.length % parts:
            raise ValueError(
                f"--length must be divided by seq:{parts} of --mesh, got {self.length}"
            )
        if self.task == "offset" and self.offset >= self.length:
            raise ValueError(f"--offset must be below --length={self.length}, got {self.offset}")
        if self.task == "recall" and 2 * self.pairs >= self.length:
            raise ValueError(
                f"--pairs must be below half of --length={self.length}, got {self.pairs}"
            )
        try:
            nnx.eval_shape(lambda: make_model(self))
        except ValueError as error:
            raise ValueError(f"--{error}") from error


def make_model(config: Config) -> TransformerLM:
    """Makes the model that a config describes.

    Layers of the recall task, and those around one that goes by content, add nothing at first.
    """
    model = TransformerLM(
        NUM_TOKENS[config.task],
        config.features,
        config.num_heads,
        config.length,
        layers=config.layers,
        positions=config.positions,
        attention=functools.partial(_attention, config),
        dropout=config.dropout,
        dtype=jnp.bfloat16 if config.bfloat16 else None,
        rngs=nnx.Rngs(config.seed),
    )
    return quieted(model) if config.task == "recall" or Content.letter in config.layers else model


def quieted(model: TransformerLM) -> TransformerLM:
    """The model with layers that at first add nothing, so that tokens say what they are."""
    for block in model.blocks:
        for last in (block.attention.out_proj, block.down_proj):
            last.kernel[...] = jnp.zeros_like(last.kernel[...])
    return model


def _attention(config: Config, *sizes: int, pattern: Pattern, **options: Any) -> DividedAttention:
    """The attention of one layer: flags that are options of its pattern reach this."""
    own = {field.name for field in dataclasses.fields(pattern)} & set(vars(config))
    if pattern.draws:
        names = "num_global", "num_local", "region"
        options["sampler"] = {name: getattr(config, name) for name in names}
    return DividedAttention(
        *sizes,
        pattern=dataclasses.replace(pattern, **{name: getattr(config, name) for name in own}),
        implementation=config.implementation,
        **options,
    )
