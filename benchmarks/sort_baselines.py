"""Relaxed sorts that a user would otherwise pick, written from their papers.

Each takes scores float [*B, s] and a temperature, and returns a row-stochastic matrix [*B, s, s]:
row i says what is in place i of the ascending order.
"""

import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

Relax = Callable[[jax.Array, float], jax.Array]


def soft_sort(scores: jax.Array, temperature: float) -> jax.Array:
    """SoftSort (Prillo and Eisenschlos, arXiv 2006.16038): distances to the sorted scores."""
    distance = jnp.abs(jnp.sort(scores, axis=-1)[..., :, None] - scores[..., None, :])
    return jax.nn.softmax(-distance / temperature, axis=-1)


def neural_sort(scores: jax.Array, temperature: float) -> jax.Array:
    """NeuralSort (Grover et al., arXiv 1903.08850), ascending."""
    size = scores.shape[-1]
    spread = jnp.abs(scores[..., :, None] - scores[..., None, :]).sum(-1)
    weight = 2 * np.arange(1, size + 1, dtype=np.float32) - size - 1
    logits = weight[:, None] * scores[..., None, :] - spread[..., None, :]
    return jax.nn.softmax(logits / temperature, axis=-1)


def sinkhorn_sort(scores: jax.Array, temperature: float, iterations: int = 50) -> jax.Array:
    """Sorting as entropic transport (Cuturi et al., arXiv 1905.11885), onto a grid of places."""
    size = scores.shape[-1]
    centred = scores - scores.mean(-1, keepdims=True)
    deviation = jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    squashed = jax.nn.sigmoid(centred / deviation)
    grid = np.linspace(0, 1, size, dtype=np.float32)
    logits = -((grid[:, None] - squashed[..., None, :]) ** 2) / temperature

    def balance(logits, _):
        for axis in (-2, -1):
            logits = logits - jax.nn.logsumexp(logits, axis, keepdims=True)
        return logits, None

    return jnp.exp(jax.lax.scan(balance, logits, length=iterations)[0])


def _cauchy(x):
    """The step of a monotonic network (Petersen et al., arXiv 2203.09630)."""
    return jnp.arctan(x) / math.pi + 0.5


def _optimal(x):
    """The step of least error in the same paper."""
    safe = jnp.where(jnp.abs(x) > 0.25, x, 1.0)
    return jnp.where(x < -0.25, -1 / (16 * safe), jnp.where(x > 0.25, 1 - 1 / (16 * safe), x + 0.5))


def odd_even(size: int) -> Iterator[list[tuple[int, int]]]:
    """The layers of odd-even transposition: pairs (place of the smaller, place of the larger)."""
    for layer in range(size):
        yield [(i, i + 1) for i in range(layer % 2, size - 1, 2)]


def bitonic(size: int) -> Iterator[list[tuple[int, int]]]:
    """The layers of Batcher's bitonic sort; `size` is a power of two."""
    if size & (size - 1):
        raise ValueError(f"size: got {size}, want a power of two")
    for run in (1 << b for b in range(1, size.bit_length())):
        gap = run // 2
        while gap:
            pairs = [(i, i ^ gap) for i in range(size) if not i & gap]
            yield [(i, j) if not i & run else (j, i) for i, j in pairs]
            gap //= 2


def sorting_network(
    scores: jax.Array, temperature: float, *, layers=odd_even, step=_cauchy
) -> jax.Array:
    """A differentiable sorting network (Petersen et al., arXiv 2105.04019)."""
    size = scores.shape[-1]
    eye = jnp.eye(size, dtype=scores.dtype)
    matrix = jnp.broadcast_to(eye, (*scores.shape, size))
    for layer in layers(size):
        if not layer:
            continue
        low, high = np.array(layer).T
        a, b = scores[..., low], scores[..., high]
        keep = step((b - a) / temperature)
        scores = scores.at[..., low].set(keep * a + (1 - keep) * b)
        scores = scores.at[..., high].set(keep * b + (1 - keep) * a)
        a, b, keep = matrix[..., low, :], matrix[..., high, :], keep[..., None]
        matrix = matrix.at[..., low, :].set(keep * a + (1 - keep) * b)
        matrix = matrix.at[..., high, :].set(keep * b + (1 - keep) * a)
    return matrix


def lap_sum(scores: jax.Array, temperature: float, iterations: int = 40) -> jax.Array:
    """LapSum (Struski et al., arXiv 2503.06242): place k holds what is in the softly smallest k + 1
    but not in the smallest k.

    The bounds at which the sum of Laplace distributions is k are found by bisection, and one step
    of Newton's method gives them their gradient.
    """
    size = scores.shape[-1]
    count = np.arange(1, size, dtype=np.float32)

    def mass(bounds, scores):
        """[*B, k, s]: how much of each score is below each bound."""
        x = (bounds[..., :, None] - scores[..., None, :]) / temperature
        tail = 0.5 * jnp.exp(-jnp.abs(x))
        return jnp.where(x < 0, tail, 1 - tail)

    fixed = jax.lax.stop_gradient(scores)
    margin = temperature * math.log(size + 1)
    shape = (*scores.shape[:-1], size - 1)
    low = jnp.broadcast_to(fixed.min(-1, keepdims=True) - margin, shape)
    high = jnp.broadcast_to(fixed.max(-1, keepdims=True) + margin, shape)

    def bisect(ends, _):
        low, high = ends
        middle = (low + high) / 2
        below = mass(middle, fixed).sum(-1) < count
        return (jnp.where(below, middle, low), jnp.where(below, high, middle)), None

    (low, high), _ = jax.lax.scan(bisect, (low, high), length=iterations)
    bounds = (low + high) / 2
    slope = (0.5 * jnp.exp(-jnp.abs(bounds[..., None] - fixed[..., None, :]) / temperature)).sum(-1)
    error = mass(bounds, scores).sum(-1) - count
    bounds = bounds - temperature * error / jnp.maximum(slope, 1e-6)
    inside = mass(bounds, scores)
    nothing = jnp.zeros_like(inside[..., :1, :])
    upto = jnp.concatenate([inside, nothing + 1], -2)
    return upto - jnp.concatenate([nothing, inside], -2)


def transport_sort(scores: jax.Array, temperature: float) -> jax.Array:
    """Sorting by transport as the library ott-jax does it; needs the extra `rivals`."""
    from ott.tools import soft_sort as ott_sort  # noqa: PLC0415, it is optional

    def one(scores):
        eye = jnp.eye(len(scores), dtype=scores.dtype)
        # Its implicit gradient solves a singular system here; so differentiate the iterations.
        fixed = {"implicit_diff": None, "min_iterations": 50, "max_iterations": 50}
        return ott_sort.sort_with(eye, scores, epsilon=temperature, **fixed)

    return jnp.vectorize(one, signature="(s)->(s,s)")(scores)


# With the temperature of each: of three, a factor of three or more apart, that which put most
# validation items in their places with `--protocol=digits --sizes=15`.
BASELINES: dict[str, tuple[Relax, float]] = {
    "NeuralSort": (neural_sort, 1.0),
    "SoftSort": (soft_sort, 0.3),
    "Sinkhorn": (sinkhorn_sort, 0.01),
    "odd-even, Cauchy": (sorting_network, 0.1),
    "odd-even, optimal": (functools.partial(sorting_network, step=_optimal), 0.1),
    "bitonic, Cauchy": (functools.partial(sorting_network, layers=bitonic), 0.1),
    "LapSum": (lap_sum, 0.3),
    "ott-jax": (transport_sort, 0.01),
}
