"""The method in NumPy float64, written from the paper with loops and dense arrays.

Nothing here is shared with the library. Equations: docs/method.md.
"""

import itertools

import numpy as np


def neighbours(mean):
    """The 2^r corners of the cell around a mean [r], as a list of integer tuples."""
    axes = [(int(np.floor(c)), int(np.ceil(c))) for c in mean]
    return list(itertools.product(*axes))


def first_occurrences(points):
    """True for points [m, r] that no earlier point equals."""
    seen, first = set(), []
    for point in map(tuple, np.asarray(points).tolist()):
        first.append(point not in seen)
        seen.add(point)
    return np.array(first, bool)


def redistribute(points, means, sigmas, values, allowed=None):
    """One chunk: points [m, r], means and sigmas [k, r], values [k] -> [m] in float64."""
    points, means, sigmas, values = (
        np.asarray(a, np.float64) for a in (points, means, sigmas, values)
    )
    open_ = first_occurrences(points.astype(np.int64))
    if allowed is not None:
        open_ = open_ & np.asarray(allowed)
    out = np.zeros(len(points))
    if not open_.any():
        return out
    for mean, sigma, value in zip(means, sigmas, values, strict=True):
        # A sigma of 0 is the limit of small ones; 1e-5 of an index is that limit in float64 too.
        log_density = -0.5 * (((points - mean) / np.maximum(sigma, 1e-5)) ** 2).sum(-1)
        log_density = np.where(open_, log_density, -np.inf)
        density = np.exp(log_density - log_density.max())
        out += value * density / density.sum()
    return out


def dense(indices, values, shape):
    """Entries indices [n, R], values [n] as a dense tensor of `shape`; entries add up."""
    tensor = np.zeros(shape)
    for index, value in zip(np.asarray(indices).tolist(), np.asarray(values), strict=True):
        tensor[tuple(index)] += value
    return tensor


def contract(indices, values, x, out_shape, in_shape):
    """A dense tensor product: x [*in_shape, *D] -> [*out_shape, *D]."""
    tensor = dense(indices, values, (*out_shape, *in_shape))
    return np.tensordot(tensor, np.asarray(x, np.float64), axes=len(in_shape))


def split_probability(scores, upper, certainty):
    """The chance that a bucket of `scores` [n] is split so that items `upper` go up."""
    pivot = np.median(scores)
    up = 1 / (1 + np.exp(-certainty * (np.asarray(scores, np.float64) - pivot)))
    return np.prod([up[i] if i in upper else 1 - up[i] for i in range(len(scores))])


def soft_split(scores, half, candidates, certainty):
    """The mean permutation of a sorted bucket over `candidates`, sets of upper items, copies once.

    The split is at `half`. Items that a candidate moves to the other side exchange places.
    """
    n = len(scores)
    total, matrix = 0.0, np.zeros((n, n))
    for upper in {frozenset(c) for c in candidates}:
        order = np.arange(n)
        rising = [row for row in range(half) if row in upper]
        falling = [row for row in range(half, n) if row not in upper]
        for low, high in zip(rising, falling, strict=True):
            order[low], order[high] = high, low
        weight = split_probability(scores, upper, certainty)
        total += weight
        matrix[np.arange(n), order] += weight
    return matrix / total


def soft_exchange(scores, half, width, certainty):
    """The permutation of a level whose buckets are split at `half`; blocks of `width` exchange."""
    scores = np.asarray(scores, np.float64)
    n = len(scores)
    odds = np.zeros((n, n))
    for low in range(n):
        for high in range(low + 1, n):
            split = (high // half) * half
            same_bucket = low // (2 * half) == high // (2 * half)
            if (
                same_bucket
                and low < split
                and (split - 1 - low) // width == (high - split) // width
            ):
                odds[low, high] = odds[high, low] = np.exp(certainty * (scores[low] - scores[high]))
    rates = odds / (1 + odds.sum(1)[:, None] + odds.sum(1)[None] - odds)
    return rates + np.diag(1 - rates.sum(1))


def attention(query, key, value, entries, seen=None):
    """Attention of queries [T, H] over keys [S, H] at entries (row, column, weight): [T, D].

    Weights of entries at the same place add up; entries of weight 0, outside the plane, or at a key
    that is not in `seen` [S] are absent. A query without keys gets 0.
    """
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    weights = np.zeros((len(query), len(key)))
    for i, j, w in entries:
        if 0 <= i < len(query) and 0 <= j < len(key) and (seen is None or seen[j]):
            weights[i, j] += w
    out = np.zeros((len(query), value.shape[1]))
    for i, row in enumerate(weights):
        (columns,) = np.nonzero(row)
        if len(columns):
            logits = key[columns] @ query[i] / np.sqrt(query.shape[1]) + np.log(row[columns])
            share = np.exp(logits - logits.max())
            out[i] = share @ value[columns] / share.sum()
    return out
