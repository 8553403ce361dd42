"""Laws of sparse self-attention and of the language model, for every kind of pattern."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from laws import FLOATS, assert_close, assert_equal

import hyperlayer_jax as hl
from hyperlayer_jax.nn import (
    Sampler,
    SparseSelfAttention,
    TransformerLM,
    generate,
    patterns,
    shorten_steps,
)
from hyperlayer_jax.nn.patterns import (
    Block,
    Content,
    Dense,
    Learned,
    Learned2D,
    Static,
    Strided,
    Window,
)
from hyperlayer_jax.nn.positions import DistanceParam, FreePositions, PositionParam
from hyperlayer_jax.nn.rotary import rotate

B, T, E, N, K, LENGTH = 2, 10, 16, 4, 2, 12
PATTERNS = {
    "learned": Learned(num_tuples=2),
    "static": Static(num_tuples=2),
    "learned2d": Learned2D(num_tuples=2),
    "strided": Strided(num_tuples=2, stride=3),
    "window": Window(window=3),
    "block": Block(num_tuples=2, block=4),
    "content": Content(num_lines=2, num_nearest=2, window=3),
    "dense": Dense(),
}
KINDS = tuple(patterns.PATTERNS)
SAMPLER = {"num_global": 1, "num_local": 1, "region": 3}


def attention(*sizes, pattern, rngs, sampler=None, **options):
    """A layer whose sampler draws few points."""
    if pattern.draws:
        options["sampler"] = SAMPLER | (sampler or {})
    return SparseSelfAttention(*sizes, pattern=pattern, num_kv_heads=K, rngs=rngs, **options)


def build(kind, own=None, **options):
    pattern = dataclasses.replace(PATTERNS[kind], **own or {})
    layer = attention(E, N, LENGTH, pattern=pattern, **options, rngs=nnx.Rngs(0, sample=1))
    if hasattr(layer.positions, "out_proj"):
        # As if trained: positions that depend on the token.
        kernel = layer.positions.out_proj.kernel
        kernel[...] = 3 * jax.random.normal(jax.random.key(5), kernel.shape)
    elif kind == "learned2d":
        # Rows start on integers, but for rounding, which compilers may do differently.
        layer.positions.means[...] += 0.02
    return layer


def tokens(dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(0).normal(size=(B, T, E)), dtype)


call = nnx.jit(lambda layer, x, mask=None: layer(x, mask=mask))
pattern_of = nnx.jit(lambda layer, x, mask=None: layer.pattern(x, mask=mask))


def entries_of(layer, pattern, b, n):
    """Every (row, column, weight) of one example and head of a layer's pattern."""
    kind = layer.kind
    if isinstance(kind, Dense):
        return [(i, j, 1.0) for i in range(T) for j in range(T) if j <= i or not layer.causal]
    leading = pattern.values.shape[: -1 if isinstance(pattern, hl.SparseTensor) else -2]
    at = (b, n)[: len(leading)]
    indices, weights = np.asarray(pattern.indices)[at], np.asarray(pattern.values)[at]
    if isinstance(kind, Learned2D):
        return [(i, j, w) for (i, j), w in zip(indices, weights, strict=True)]
    rows = [
        (i, j, w)
        for i, row in enumerate(zip(indices[..., 0], weights, strict=True))
        for j, w in zip(*row, strict=True)
    ]
    if isinstance(kind, Strided):
        own = [(i, i, 1.0) for i in range(T) if (i + 1) % kind.stride]
        return own + [((i + 1) * kind.stride - 1, j, w) for i, j, w in rows]
    size = kind.block if isinstance(kind, Block) else 1
    spread = [
        (i * size + di, j * size + dj, w)
        for i, j, w in rows
        for di in range(size)
        for dj in range(size)
    ]
    return [(i, j, w) for i, j, w in spread if j <= i or not layer.causal]


@pytest.mark.parametrize(("causal", "masked"), [(True, False), (False, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_attention_over_its_pattern(kind, causal, masked):
    layer = nnx.view(build(kind, causal=causal), deterministic=True)
    x = tokens()
    mask = jnp.ones((B, T), bool).at[0, 7:].set(False).at[1, :2].set(False) if masked else None
    out = call(layer, x, mask)
    pattern = pattern_of(layer, x, mask)
    heads = np.split(np.asarray(layer.qkv_proj(x)).reshape(B, T, N + 2 * K, -1), [N, N + K], axis=2)
    rows = jnp.arange(T, dtype=jnp.int32)
    query, key = (np.asarray(rotate(jnp.asarray(y), rows)) for y in heads[:2])
    attended = np.zeros((B, T, N, E // N))
    for b in range(B):
        for n in range(N):
            seen = None if mask is None else np.asarray(mask)[b]
            own = n // (N // K)
            attended[b, :, n] = oracle.attention(
                query[b, :, n],
                key[b, :, own],
                heads[2][b, :, own],
                entries_of(layer, pattern, b, n),
                seen,
            )
    want = attended.reshape(B, T, E) @ np.asarray(layer.out_proj.kernel[...])
    if masked:
        want = np.where(np.asarray(mask)[..., None], want, 0)
    assert_close(out, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_no_token_sees_a_later_one(kind, deterministic):
    graphdef, state = nnx.split(nnx.view(build(kind), deterministic=deterministic))
    forward = jax.jit(lambda x: nnx.merge(graphdef, state, copy=True)(x))  # noqa: PLW0108
    x = tokens()
    out = forward(x)
    for t in (1, 4, 5, 8):
        changed = forward(x.at[:, t].set(9 * x[:, t] + 1))
        assert_equal(changed[:, :t], out[:, :t])
        assert (np.asarray(changed[:, t]) != np.asarray(out[:, t])).any()


@pytest.mark.parametrize(
    ("kind", "own"),
    [*((kind, {}) for kind in KINDS), *((k, {"shared": True}) for k in ("learned", "block"))],
)
def test_a_cache_gives_what_the_whole_sequence_gives(kind, own):
    layer = nnx.view(build(kind, own=own), deterministic=True)
    x = tokens()
    extend = nnx.jit(lambda layer, x, cache: layer.extend(x, cache))
    out, cache = extend(layer, x[:, :5], layer.init_cache(B))
    outs = [out]
    for t in range(5, T):
        out, cache = extend(layer, x[:, t : t + 1], cache)
        outs.append(out)
    assert cache.length == T
    assert_close(jnp.concatenate(outs, 1), call(layer, x))


def test_a_cache_is_of_the_dtype_of_the_computation():
    layer = nnx.view(build("learned", dtype=jnp.bfloat16), deterministic=True)
    x = tokens(jnp.bfloat16)
    out, cache = nnx.jit(lambda layer, x: layer.extend(x, layer.init_cache(B)))(layer, x)
    assert out.dtype == cache.keys.dtype == cache.values.dtype == jnp.bfloat16
    assert_close(out, call(layer, x))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_param(kind, dtype):
    layer = build(kind, dtype=dtype)

    @nnx.jit
    @functools.partial(nnx.grad, has_aux=True)
    def gradient(layer, x):
        out = layer(x)
        return (out**2).mean().astype(jnp.float32), out

    # The dense attention of jax itself promotes, in its gradient.
    with jax.numpy_dtype_promotion("standard" if kind in ("window", "dense") else "strict"):
        gradients, out = gradient(layer, tokens(dtype))
    assert out.dtype == dtype
    for path, leaf in nnx.to_flat_state(gradients):
        assert np.isfinite(np.asarray(leaf[...])).all(), path
        assert np.asarray(leaf[...]).any(), path


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_do_not_exist_change_nothing(kind, causal):
    """Nor do they make a gradient, of tokens and of parameters, that is not finite."""
    graphdef, params, rest = nnx.split(build(kind, causal=causal), nnx.Param, ...)

    @jax.jit
    def run(x, mask):
        def forward(params, x):
            return nnx.merge(graphdef, params, rest, copy=True)(x, mask=mask)

        out, vjp = jax.vjp(forward, params, x)
        return out, vjp(2 * out)

    x = tokens()
    # Of the second block of four, only the second token exists; of the other example, none.
    mask = jnp.ones((B, T), bool).at[0, 3:5].set(False).at[0, 6:].set(False).at[1, :].set(False)
    out, (param_gradients, grad) = run(x, mask)
    assert_equal(out, run(jnp.where(mask[..., None], x, 7.0), mask)[0])
    assert not np.asarray(out)[~np.asarray(mask)].any()
    assert np.asarray(out)[np.asarray(mask)].any()
    for leaf in jax.tree.leaves((param_gradients, grad)):
        assert np.isfinite(np.asarray(leaf)).all()
    assert not np.asarray(grad)[~np.asarray(mask)].any()


def test_blocks_without_tokens_have_no_share():
    layer = nnx.view(build("block", causal=False, own={"shared": True}), deterministic=True)
    mask = jnp.ones((B, T), bool).at[0, :4].set(False).at[1, 1:].set(False)
    pattern = pattern_of(layer, tokens(), mask)
    exists = np.array([[False, True, True], [True, False, False]])
    columns, weights = np.asarray(pattern.indices)[..., 0], np.asarray(pattern.values)
    # The first column is a block's own; the others are points that both tuples share.
    seen = np.take_along_axis(exists[:, None], columns, 2) & (columns != columns[..., :1])
    weights, seen = weights[..., 1:], seen[..., 1:]
    assert not weights[~seen].any()
    assert_close(weights.sum(-1), 2.0 * seen.any(-1))
    assert seen.any(-1).sum() > 3


@pytest.mark.parametrize("kind", KINDS)
def test_padding_gives_what_the_shorter_sequence_gives(kind):
    layer = nnx.view(build(kind), deterministic=True)
    x, short = tokens(), 7
    mask = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None] < short, (B, T))
    assert_close(call(layer, x, mask)[:, :short], call(layer, x[:, :short]))


@pytest.mark.parametrize("causal", [False, True])
def test_entries_that_are_free_are_the_same_for_any_number_of_tokens(causal):
    layer = nnx.view(build("learned2d", causal=causal), deterministic=True)
    x = jnp.pad(tokens(), [(0, 0), (0, LENGTH - T), (0, 0)])
    part, whole = (hl.todense(pattern_of(layer, y)) for y in (x[:, :T], x))
    assert_close(part, whole[..., :T, :T])


@pytest.mark.parametrize("causal", [False, True])
def test_a_window_over_all_tokens_is_dense_attention(causal):
    layers = (("window", {"window": 2 * T}), ("dense", {}))
    window, dense = (build(kind, own=own, causal=causal) for kind, own in layers)
    assert_close(call(window, tokens()), call(dense, tokens()))


@pytest.mark.parametrize("kind", ["learned", "static", "block"])
def test_heads_have_patterns_of_their_own_or_share_one(kind):
    x = tokens()
    layers = (build(kind, own={"shared": shared}) for shared in (False, True))
    own, shared = (pattern_of(nnx.view(layer, deterministic=True), x) for layer in layers)
    assert own.indices.shape[:2] == (B, N)
    assert shared.indices.shape == (B, *own.indices.shape[2:])


@pytest.mark.parametrize("sigma", [-1.0, 0.27])
def test_a_tuple_is_as_wide_in_evaluation_as_in_training(sigma):
    """Given enough points, drawn or not, keys have the shares of a Gaussian cut off at borders."""
    sampler = {"num_global": 64, "num_local": 0}
    layer = build("static", causal=False, own={"num_tuples": 1}, sampler=sampler)
    parameters = layer.positions.parameters
    parameters[...] = parameters[...].at[..., 1].set(sigma)
    fixed = nnx.view(layer, deterministic=True)
    dense = nnx.jit(lambda layer, x: hl.todense(layer.pattern(x)))
    drawn, fixed = (np.asarray(dense(kind, tokens())) for kind in (layer, fixed))
    assert np.abs(fixed - drawn).max() < 0.03
    assert ((fixed > 0.05).sum(-1).max() > 4) == (sigma > 0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["static", "learned"])
@pytest.mark.parametrize("sigma", [-0.6, -0.3, 0.0, 1.0])
def test_no_distance_and_no_sigma_moves_by_more_than_three_sigmas_a_unit(kind, sigma, causal):
    layer, size = build(kind, causal=causal, own={"min_sigma": 0.01}), 1e-3
    free = layer.positions if kind == "static" else layer.positions.free
    free.parameters[...] = free.parameters[...].at[..., 1].set(sigma)
    params = nnx.state(layer, nnx.Param)
    updates = jax.tree.map(lambda x: jnp.full_like(x, size), params)
    short = shorten_steps(layer)(updates, params)

    rows = jnp.asarray([T // 2], jnp.int32)
    before = free.tuples(free.raw(), rows)
    nnx.update(layer, jax.tree.map(jnp.add, params, short))
    after = free.tuples(free.raw(), rows)
    for old, new in ((before.means, after.means), (before.sigmas, after.sigmas)):
        moved = np.abs(new - old) / (size * before.sigmas)
        np.testing.assert_array_less(moved, 3.1)
        if sigma == -0.6:
            np.testing.assert_array_less(2.9, moved)

    for _, update in nnx.to_flat_state(short):
        if isinstance(update, DistanceParam):
            assert (update[...] <= np.float32(size)).all()
        else:
            part = 0.1 if isinstance(update, PositionParam) else 1
            np.testing.assert_allclose(update[...], size * part, rtol=1e-6)


def test_steps_are_shortened_in_any_tree_of_the_same_parameters():
    layer = build("learned")
    params = nnx.state(layer, nnx.Param)
    shorten = shorten_steps(nnx.Sequential(layer))
    want = shorten(params, params)
    place = params["positions"]["place"][...]
    assert_close(want["positions"]["place"][...], 0.1 * place)
    for wrapped in (nnx.to_pure_dict(params), {"model": [params]}, jax.tree.leaves(params)):
        got = shorten(wrapped, wrapped)
        assert jax.tree.structure(got) == jax.tree.structure(wrapped)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert_equal(a, b)
    with pytest.raises(ValueError, match="updates: "):
        shorten(params["positions"], params["positions"])


@pytest.mark.parametrize("causal", [False, True])
def test_free_positions_start_apart_and_inside(causal):
    free = FreePositions(3, 4, 100, causal=causal, min_sigma=0.5)
    tuples = free.tuples(free.raw(), jnp.asarray([99 if causal else 50], jnp.int32))
    means = np.sort(np.asarray(tuples.means).ravel())
    assert (np.diff(means) > 0.1).all()
    if causal:
        assert means.min() >= 0 and means.max() <= 99
    else:
        assert means.min() < 40 and means.max() > 60
    sigmas = np.asarray(tuples.sigmas).ravel()[np.argsort(np.asarray(tuples.means).ravel())]
    within = 1 if causal else 2
    assert (within * (sigmas[1:] + sigmas[:-1]) > np.diff(means)).all()


def test_turning_multiplies_by_a_complex_number():
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, 5, 3, 8)))
    rows = np.asarray([0, 3, 4, 100, 1000])
    rates = 10_000.0 ** (-np.arange(4) / 4)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * rows[:, None] * rates)[None, :, None]
    want = np.concatenate([turned.real, turned.imag], -1)
    assert_close(rotate(jnp.asarray(x), jnp.asarray(rows, jnp.int32)), want, rtol=1e-4, atol=1e-4)


def test_logits_of_turned_vectors_depend_on_the_distance_alone():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    turn = lambda x, t: rotate(x, jnp.asarray([t], jnp.int32))  # noqa: E731
    dot = lambda i, j: (turn(query, i) * turn(key, j)).sum()  # noqa: E731
    assert_close(dot(5, 3), dot(105, 103), rtol=1e-4, atol=1e-4)
    assert abs(dot(5, 3) - dot(5, 4)) > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "wide"}, "pattern"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"features": 15}, "num_heads"),
        ({"features": 12}, "rotary"),
        ({"num_kv_heads": 0}, "num_kv_heads"),
        ({"pattern": "window", "sampler": Sampler(rngs=nnx.Rngs(0))}, "sampler: .* draws nothing"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    arguments = {"features": E, "num_heads": N, "max_length": LENGTH, "rngs": nnx.Rngs(0)}
    with pytest.raises(ValueError, match=message):
        SparseSelfAttention(**(arguments | options))


@pytest.mark.parametrize(
    ("pattern", "option", "value"),
    [
        (Learned2D, "num_tuples", 0),
        (Window, "window", -1),
        (Strided, "stride", 0),
        (Block, "block", 2.0),
        (Static, "min_sigma", -1.0),
    ],
)
def test_a_wrong_option_of_a_pattern_is_named(pattern, option, value):
    with pytest.raises(ValueError, match=f"{option}: got"):
        pattern(**{option: value})


def test_wrong_inputs_are_named():
    layer = build("window")
    with pytest.raises(ValueError, match="x: "):
        layer(jnp.zeros((B, LENGTH + 1, E)))
    with pytest.raises(ValueError, match=rf"x: got .* want .* {E}"):
        layer(jnp.zeros((B, T, 2 * E)))
    with pytest.raises(ValueError, match="mask: "):
        layer(tokens(), mask=jnp.ones((B, T + 1), bool))
    with pytest.raises(ValueError, match="causal"):
        build("window", causal=False).init_cache(B)


@functools.cache
def language_model(layers, positions="rotary", dropout=0.1):
    by_letter = {pattern.letter: pattern for pattern in PATTERNS.values()}
    return TransformerLM(
        11,
        E,
        N,
        LENGTH,
        layers=[by_letter[letter] for letter in layers],
        positions=positions,
        attention=attention,
        dropout=dropout,
        rngs=nnx.Rngs(0),
    )


@pytest.mark.slow
def test_a_language_model_continues_as_it_predicts():
    model = nnx.view(language_model("lwd", positions="learned"), deterministic=True)
    prompt = jax.random.randint(jax.random.key(0), (B, 4), 0, 11, jnp.int32)
    drawn = generate(jax.random.key(1), model, prompt, num_tokens=6, temperature=0)
    text = jnp.concatenate([prompt, drawn], axis=1)
    logits = nnx.jit(lambda model, text: model(text))(model, text)
    assert_equal(drawn, logits[:, 3:-1].argmax(-1).astype(jnp.int32))
    shown = nnx.jit(lambda model, text: model.patterns(text))(model, text)
    assert [pattern is None for pattern in shown] == [False, False, True]


def test_a_temperature_draws_by_key():
    model = nnx.view(language_model("w"), deterministic=True)
    prompt = jnp.zeros((B, 1), jnp.int32)
    draw = functools.partial(generate, model=model, prompt=prompt, num_tokens=8)
    first, again, other = (draw(jax.random.key(seed)) for seed in (0, 0, 1))
    assert_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).any()
    likeliest, coldest = (draw(jax.random.key(0), temperature=t) for t in (0, 1e-38))
    assert_equal(likeliest, coldest)


def test_a_second_text_is_not_compiled_anew(monkeypatch):
    calls, extend = [], TransformerLM.extend
    monkeypatch.setattr(TransformerLM, "extend", lambda *args: calls.append(1) or extend(*args))
    model, prompt = language_model("w"), jnp.zeros((1, 2), jnp.int32)
    texts = [generate(jax.random.key(0), model, prompt, num_tokens=3)]
    traced = len(calls)
    texts.append(generate(jax.random.key(0), model, prompt, num_tokens=3))
    assert traced and len(calls) == traced
    assert_equal(*texts)


def test_texts_are_drawn_without_dropout():
    model, prompt = language_model("w", dropout=0.9), jnp.zeros((B, 2), jnp.int32)
    fixed = nnx.view(model, deterministic=True)
    draw = functools.partial(generate, jax.random.key(0), prompt=prompt, num_tokens=8)
    assert_equal(draw(model), draw(fixed))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "wx"}, "layers"),
        ({"layers": ""}, "layers"),
        ({"positions": "absolute"}, "positions"),
    ],
)
def test_a_wrong_option_of_a_language_model_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        TransformerLM(11, E, N, LENGTH, **options, rngs=nnx.Rngs(0))


def test_a_table_shows_a_language_model():
    model = TransformerLM(11, E, N, LENGTH, layers="lw", rngs=nnx.Rngs(0))
    with jax.numpy_rank_promotion("allow"):
        table = nnx.tabulate(model, jnp.zeros((B, T), jnp.int32))
    assert "TransformerLM Summary" in table and "blocks" in table


def test_wrong_inputs_of_a_language_model_are_named():
    model = nnx.view(language_model("w"), deterministic=True)
    key = jax.random.key(0)
    prompt = jnp.zeros((B, 4), jnp.int32)
    with pytest.raises(ValueError, match="tokens: "):
        model(jnp.zeros((B, LENGTH + 1), jnp.int32))
    with pytest.raises(ValueError, match="tokens: "):
        model(jnp.zeros((B, 4)))
    with pytest.raises(ValueError, match="prompt: "):
        generate(key, model, prompt, num_tokens=LENGTH)
    with pytest.raises(ValueError, match="temperature: "):
        generate(key, model, prompt, num_tokens=2, temperature=-1.0)
