"""Laws of block attention on Mosaic GPU, interpreted, against the float64 oracle and plain JAX.

Interpreted copies arrive at once and products end where they begin: what is proven here is the
arithmetic, not the order of asynchronous steps, which only a device can test.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import kernels_oracle as oracle
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from hyperlayer_jax import kernels
from hyperlayer_jax.kernels.attention import mosaic_gpu, reference

# Members of the batch, block, features of keys and values, entries, causal, and whether masked.
CASES = {
    "one tile to a block": (2, 64, 64, 64, 3, False, False),
    "causal": (2, 64, 64, 128, 2, True, False),
    "four tiles to a block": (1, 128, 128, 64, 2, True, False),
    "one entry": (1, 64, 64, 64, 1, False, False),
    "masked": (1, 64, 64, 64, 6, False, True),
}
SCALE = 0.3


@pytest.fixture
def interpreted():
    """On a CPU; on a GPU the kernels run as they are."""
    if jax.default_backend() != "cpu":
        mode = contextlib.nullcontext()
    elif hasattr(plgpu, "force_gpu_interpret_mode"):
        mode = plgpu.force_gpu_interpret_mode()
    else:
        pytest.skip("this jax has no interpreter of Mosaic GPU kernels")
    with mode:
        yield


interpreted_or_real = pytest.mark.usefixtures("interpreted")


def example(case):
    """Floats, other operands and sizes: 2 blocks of queries, 3 of keys, some absent or hidden."""
    b, block, d, e, p, causal, masked = CASES[case]
    rng = np.random.default_rng(0)

    def operand(*shape, scale=1.0):
        return jnp.asarray(scale * rng.standard_normal((b, *shape)), jnp.bfloat16)

    indices = jnp.asarray(rng.integers(-1, 4, (b, 2, p)), jnp.int32)
    log_weights = jnp.where(rng.random((b, 2, p)) < 0.2, -jnp.inf, operand(2, p))
    q, k = operand(2 * block, d, scale=0.8), operand(3 * block, d, scale=0.8)
    # Some keys of the first tile, and all of the second.
    mask = jnp.asarray(rng.random((b, 3 * block)) < 0.7).at[:, block : 2 * block].set(False)
    floats = q, k, operand(3 * block, e), log_weights.astype(jnp.float32)
    sizes = {"block": block, "causal": causal, "scale": SCALE}
    return floats, indices, [mask] * masked, sizes


@functools.partial(jax.jit, static_argnums=(0, 4))
def run(module, floats, indices, mask, sizes, cotangent):
    *qkv, log_weights = floats
    operands, sizes = (*qkv, indices, log_weights, *mask), dict(sizes)
    name = "masked_block_attention" if mask else "block_attention"
    out, log_sum_exp = getattr(module, name)(*operands, **sizes)
    grad = out if cotangent is None else cotangent
    return out, getattr(module, name + "_grad")(*operands, out, log_sum_exp, grad, **sizes)


def attend(module, floats, indices, mask, sizes, cotangent=None):
    """The result, and the gradients for a cotangent, by default the result itself.

    Not through the primitives of the library: the interpreter of Mosaic GPU kernels has effects,
    which a lowering rule cannot have.
    """
    sizes = sizes if module is reference else sizes | {"interpret": True}
    return run(module, floats, indices, mask, tuple(sizes.items()), cotangent)


def assert_close(actual, expected):
    """To the rounding of the weights to bfloat16, which is relative to the largest."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    np.testing.assert_allclose(actual, expected, 2e-2, 2e-2 * np.abs(expected).max())


@pytest.mark.slow
@interpreted_or_real
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_oracle_and_gradients_with_plain_jax(case):
    floats, indices, mask, sizes = example(case)
    out, gradients = attend(mosaic_gpu, floats, indices, mask, sizes)
    q, k, v, log_weights = floats
    expected = oracle.block_attention(
        np.asarray(q, np.float64) * SCALE,
        k,
        v,
        np.asarray(indices),
        log_weights,
        block=sizes["block"],
        causal=sizes["causal"],
        mask=np.asarray(mask[0]) if mask else None,
    )
    assert_close(out, expected)
    plain, wanted = attend(reference, floats, indices, mask, sizes)
    assert_close(plain, expected)
    assert [g.dtype for g in gradients] == [f.dtype for f in floats]
    jax.tree.map(assert_close, list(gradients), list(wanted))


@pytest.mark.slow
@interpreted_or_real
def test_gives_the_same_bits_twice_and_under_a_mask_that_hides_nothing():
    floats, indices, _, sizes = example("causal")
    mask = jnp.ones(floats[1].shape[:2], bool)
    expected = attend(mosaic_gpu, floats, indices, [], sizes)
    for masks in ([], [mask]):
        actual = attend(mosaic_gpu, floats, indices, masks, sizes)
        jax.tree.map(np.testing.assert_array_equal, actual, expected)


@interpreted_or_real
@pytest.mark.parametrize("case", ["one tile to a block", "masked"])
def test_what_is_absent_or_hidden_is_not_read(case):
    (q, k, v, log_weights), indices, mask, sizes = example(case)
    k, v = jnp.full_like(k, jnp.nan), jnp.full_like(v, jnp.nan)
    if mask:
        mask = [jnp.zeros_like(mask[0])]
    else:
        log_weights = jnp.full_like(log_weights, -jnp.inf)
    floats = q, k, v, log_weights
    out, gradients = attend(
        mosaic_gpu, floats, indices, mask, sizes, jnp.ones_like(v[:, : q.shape[1]])
    )
    for array in (out, *gradients):
        np.testing.assert_array_equal(array, 0)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("n, num_tiles", [(16, 40), (200, 7)])
def test_lists_by_key_are_those_of_a_search(n, num_tiles, many, monkeypatch):
    """Also where a tile has no row, where it has all, and where a word does not hold an entry."""
    if many:
        monkeypatch.setattr(mosaic_gpu, "_MAX_WORD", 0)
    rng = np.random.default_rng(0)
    tiles = np.minimum(rng.integers(0, num_tiles + 1, (2, n, 1)), rng.integers(0, num_tiles + 1))
    present = rng.random(tiles.shape) < 0.8
    operands = tiles.astype(np.int32), tiles.astype(np.float32), present
    rows, weights, starts, counts = map(
        np.asarray, jax.jit(mosaic_gpu._by_key, static_argnums=3)(*operands, num_tiles)
    )
    for b, tile in np.ndindex(2, num_tiles):
        wanted = np.nonzero((tiles[b] == tile) & present[b])[0]
        got = slice(starts[b, tile], starts[b, tile] + counts[b, tile])
        np.testing.assert_array_equal(rows[b, got], wanted)
        np.testing.assert_array_equal(weights[b, got], tile)


@pytest.mark.parametrize("pairs", [0, 64])
def test_lists_by_query_hold_what_is_present_in_order(pairs, monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "_MAX_PAIRS", pairs)
    rng = np.random.default_rng(0)
    present = rng.random((2, 5, 7)) < 0.5
    tiles, weights = rng.integers(0, 9, present.shape, np.int32), rng.random(present.shape, "f")
    weights = np.where(present, weights, -np.inf)
    got = map(np.asarray, jax.jit(mosaic_gpu._by_query)(tiles, weights, present))
    listed, weighed, starts, counts = got
    for b, row in np.ndindex(2, 5):
        at, where = slice(starts[b, row], starts[b, row] + counts[b, row]), present[b, row]
        np.testing.assert_array_equal(listed[b, at], tiles[b, row, where])
        np.testing.assert_array_equal(weighed[b, at], weights[b, row, where])


@pytest.mark.parametrize("pairs", [0, 64])
def test_integers_of_lists_are_of_32_bits(pairs, monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "_MAX_PAIRS", pairs)
    like = [jax.ShapeDtypeStruct((2, 5, 7), t) for t in (jnp.int32, jnp.float32, jnp.bool)]
    with jax.enable_x64(True):
        by_query = jax.eval_shape(mosaic_gpu._by_query, *like)
        by_key = jax.eval_shape(functools.partial(mosaic_gpu._by_key, num_tiles=9), *like)
    assert {x.dtype.itemsize for x in (*by_query, *by_key)} == {4}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dtype": jnp.float32}, "it multiplies bfloat16, got float32"),
        ({"block": 32}, "it works in tiles of 64, got blocks of 32"),
        ({"d": 80}, "it serves heads of 64 or 128 features, got 80"),
        ({"scale": 0.0}, "it takes a scale above 0, got 0.0"),
    ],
)
def test_says_what_it_lacks(changes, message):
    sizes = {"dtype": jnp.bfloat16, "block": 64, "d": 64, "scale": 1.0} | changes
    dtype, block, d, scale = sizes.values()
    x, log_weights = jnp.zeros((2 * block, d), dtype), jnp.zeros((2, 1), dtype)
    attend = functools.partial(
        kernels.block_attention,
        block=block,
        causal=True,
        scale=scale,
        implementation="mosaic_gpu",
    )
    with pytest.raises(NotImplementedError, match=message):
        attend(x, x, x, jnp.zeros((2, 1), jnp.int32), log_weights)
