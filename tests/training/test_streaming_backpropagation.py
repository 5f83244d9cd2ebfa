"""Streamed backpropagation: every gradient against JAX and finite differences, every chunk, backend and edge."""

from __future__ import annotations

import functools
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from algokit.arrays import kind_of, to_numpy
from algokit.training import _tiles as tiles
from algokit.training import streaming_backpropagation as module
from algokit.training.streaming_backpropagation import (
    StreamLM,
    activation_bytes,
    block_forward,
    causal_attention,
    init_block,
    stream_attention_vjp,
    stream_block_vjp,
    stream_dpo_head,
    stream_grpo_head,
    stream_lm_head,
)

jax = pytest.importorskip("jax")
jnp = jax.numpy

RNG = np.random.default_rng(7)
H, W, T3 = RNG.normal(size=(3, 2)), RNG.normal(size=(2, 4)), np.array([0, 3, 1])
LOGP = np.log(np.array([0.2, 0.3, 0.4]))
Q, K, V, G = RNG.normal(size=(4, 3, 2))
BLOCK = init_block(4, n_heads=2, d_ff=6, rng=1)
X3, G3 = RNG.normal(size=(2, 3, 4))
SIZES = dict(vocab=5, d=4, n_layers=2, n_heads=2, layer_chunk=2, logits_chunk=2)
TOKENS = np.array([0, 1, 2, 3, 4])


def small_model() -> StreamLM:
    return StreamLM(**SIZES)


EXAMPLES = {
    "stream_lm_head": dict(h=H, W=W, targets=T3, chunk=2, weights=np.ones(3), normalize=True),
    "stream_dpo_head": dict(h_w=H, t_w=T3, h_l=H[:2], t_l=T3[:2], W=W, ref_w=-3.0, ref_l=-2.0, beta=0.1, chunk=2),
    "stream_grpo_head": dict(
        h=H, W=W, targets=T3, old_logp=LOGP, ref_logp=LOGP, advantage=1.0, clip=0.2, beta_kl=0.04, chunk=2,
        weights=np.ones(3),
    ),
    "causal_attention": dict(q=Q, k=K, v=V),
    "stream_attention_vjp": dict(q=Q, k=K, v=V, g=G, chunk=2),
    "init_block": dict(d=4, n_heads=2, d_ff=6, rng=0, dtype=np.float64),
    "block_forward": dict(params=BLOCK, x=X3, n_heads=2),
    "stream_block_vjp": dict(params=BLOCK, x=X3, g=G3, n_heads=2, chunk=2, cache_kv=True),
    "StreamLM": SIZES,
    "StreamLM.init": (small_model, dict(rng=0)),
    "StreamLM.loss": (small_model, dict(params=small_model().init(0), tokens=TOKENS)),
    "StreamLM.value_and_grad": (
        small_model, dict(params=small_model().init(0), tokens=TOKENS, weights=np.ones(4)),
    ),
    "activation_bytes": dict(
        T=8, d=4, d_ff=6, vocab=5, n_layers=2, n_heads=2, method="stream", layer_chunk=2, logits_chunk=2, itemsize=8
    ),
}  # fmt: skip


# The same model in JAX, written from the definitions: full T x C logits, full T x T masked attention.


def norm_jax(x, gain):
    return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + tiles.EPS) * gain


def attention_jax(q, k, v):
    scores = q @ jnp.swapaxes(k, -1, -2) / np.sqrt(q.shape[-1])
    scores = jnp.where(np.tri(q.shape[-2], dtype=bool), scores, -jnp.inf)
    return jax.nn.softmax(scores, -1) @ v


def block_jax(p, x, n_heads):
    def split(a):
        return jnp.swapaxes(a.reshape(*a.shape[:-1], n_heads, -1), -2, -3)

    a = norm_jax(x, p["norm1"])
    o = attention_jax(split(a @ p["wq"]), split(a @ p["wk"]), split(a @ p["wv"]))
    x = x + jnp.swapaxes(o, -2, -3).reshape(x.shape) @ p["wo"]
    return x + jax.nn.gelu(norm_jax(x, p["norm2"]) @ p["w1"], approximate=True) @ p["w2"]


def logp_jax(h, W, targets):
    return jnp.take_along_axis(jax.nn.log_softmax(h @ W, -1), targets[..., None], -1)[..., 0]


def lm_jax(params, tokens, weights, n_heads):
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    x = params["embed"][inputs] + module._positions(inputs.shape[1], params["embed"].shape[1])
    for p in params["blocks"]:
        x = jax.checkpoint(block_jax, static_argnums=2)(p, x, n_heads)
    logp = logp_jax(norm_jax(x, params["norm"]), params["head"], targets)
    return -jnp.sum(weights * logp) / jnp.sum(weights)


@pytest.fixture(autouse=True)
def double_precision():
    x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    with x64(True), threadpool_limits(1):  # small matrices: more threads only wait for each other
        yield


def reference(function):
    """What JAX says, computed once per problem and compared with the slices of every size."""
    cached = functools.cache(function)
    return lambda *problem: cached(*problem)


def assert_close(ours, theirs, tol=1e-11):
    """Largest difference below tol times the largest entry, leaf by leaf."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    for a, b in pairs:
        a, b = to_numpy(a), np.asarray(b)
        assert a.shape == b.shape and np.abs(a - b).max() <= tol * max(1.0, np.abs(b).max())


CHUNKS = [1, 2, 7, 32, 40, 41, 1000]


def head_problem(T=41, d=6, C=23, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(T, d)), rng.normal(size=(d, C)), rng.integers(0, C, T), rng


@reference
def cross_entropy_in_jax(normalize):
    h, W, t, rng = head_problem()
    w = rng.random(41)
    w[[3, 17]] = 0

    def loss(h, W):
        total = -jnp.sum(w * logp_jax(h, W, t))
        return total / w.sum() if normalize else total

    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(h, W)
    return h, W, t, w, value, (*gradients, logp_jax(h, W, t))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_head_is_the_gradient_of_cross_entropy(chunk, normalize):
    h, W, t, w, value, gradients = cross_entropy_in_jax(normalize)
    result = stream_lm_head(h, W, t, chunk=chunk, weights=w, normalize=normalize)
    assert result.loss == pytest.approx(float(value), rel=1e-13)
    assert_close(result[1:], gradients)
    assert (result.grad_h[[3, 17]] == 0).all()  # masked positions: exactly nothing


def test_head_by_hand():
    """One position, two tokens, logits (0, log 3): softmax (1/4, 3/4)."""
    W = np.array([[0.0, np.log(3.0)]])
    result = stream_lm_head(np.ones((1, 1)), W, np.array([0]), chunk=5)
    assert result.loss == pytest.approx(np.log(4.0))
    np.testing.assert_allclose(result.grad_W, [[-0.75, 0.75]])
    np.testing.assert_allclose(result.grad_h, [[0.75 * np.log(3.0)]])


def test_head_survives_huge_logits():
    result = stream_lm_head(np.array([[1e4], [-1e4]]), np.array([[1.0, -1.0]]), np.array([1, 1]), chunk=1)
    assert result.loss == pytest.approx(1e4) and np.isfinite(result.grad_W).all()
    np.testing.assert_allclose(result.logp, [-2e4, 0.0])


@reference
def dpo_in_jax():
    h_w, W, t_w, rng = head_problem()
    h_l, t_l = rng.normal(size=(30, 6)), rng.integers(0, 23, 30)
    numbers = dict(ref_w=-130.0, ref_l=-95.0, beta=0.13)

    def loss(h_w, h_l, W):
        log_ratio_w = logp_jax(h_w, W, t_w).sum() - numbers["ref_w"]
        log_ratio_l = logp_jax(h_l, W, t_l).sum() - numbers["ref_l"]
        return -jax.nn.log_sigmoid(numbers["beta"] * (log_ratio_w - log_ratio_l))

    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(h_w, h_l, W)
    return (h_w, t_w, h_l, t_l, W), numbers, value, gradients


@pytest.mark.parametrize("chunk", CHUNKS)
def test_dpo_is_the_gradient_of_its_loss(chunk):
    arguments, numbers, value, gradients = dpo_in_jax()
    result = stream_dpo_head(*arguments, **numbers, chunk=chunk)
    assert result.loss == pytest.approx(float(value), rel=1e-12)
    assert result.loss == pytest.approx(np.log1p(np.exp(-result.margin)))
    assert_close(result[1:4], gradients)


def test_dpo_of_two_equal_answers_is_log_two_with_opposite_gradients():
    h, W, t, _ = head_problem()
    result = stream_dpo_head(h, t, h, t, W, ref_w=-5.0, ref_l=-5.0)
    assert result.loss == pytest.approx(np.log(2)) and result.margin == 0
    np.testing.assert_array_equal(result.grad_h_w, -result.grad_h_l)
    np.testing.assert_allclose(result.grad_W, 0, atol=1e-14)


@reference
def grpo_in_jax(advantage):
    h, W, t, rng = head_problem()
    now = np.asarray(logp_jax(h, W, t))
    old, ref = (np.minimum(now + rng.normal(0, 0.4, 41), 0) for _ in range(2))  # ratios on both sides of the clip

    def loss(h, W):
        logp = logp_jax(h, W, t)
        ratio, delta = jnp.exp(logp - old), ref - logp
        gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage)
        return -jnp.mean(gain - 0.04 * (jnp.exp(delta) - delta - 1))

    return (h, W, t), dict(old_logp=old, ref_logp=ref), *jax.jit(jax.value_and_grad(loss, (0, 1)))(h, W)


@pytest.mark.parametrize("advantage", [1.3, -0.7, 0.0])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_grpo_is_the_gradient_of_its_loss(chunk, advantage):
    arguments, before, value, gradients = grpo_in_jax(advantage)
    result = stream_grpo_head(*arguments, **before, advantage=advantage, chunk=chunk)
    assert result.loss == pytest.approx(float(value), rel=1e-12, abs=1e-14)
    assert_close(result[1:3], gradients)


def test_a_group_laid_end_to_end_is_the_mean_over_its_answers():
    h, W, t, rng = head_problem()
    cut, gains = 15, (0.8, -1.1)
    old = np.minimum(np.asarray(logp_jax(h, W, t)) + rng.normal(0, 0.2, 41), 0)
    w = np.where(np.arange(41) < cut, 1 / (2 * cut), 1 / (2 * (41 - cut)))
    both = stream_grpo_head(
        h, W, t, old_logp=old, ref_logp=old, advantage=np.where(np.arange(41) < cut, *gains), weights=w, chunk=4
    )
    parts = [
        stream_grpo_head(h[s], W, t[s], old_logp=old[s], ref_logp=old[s], advantage=a)
        for s, a in zip((slice(0, cut), slice(cut, 41)), gains, strict=True)
    ]
    assert both.loss == pytest.approx(np.mean([p.loss for p in parts]))
    np.testing.assert_allclose(both.grad_W, np.mean([p.grad_W for p in parts], axis=0), atol=1e-14)


@reference
def attention_in_jax(lead):
    q, k, v, g = np.random.default_rng(0).normal(size=(4, *lead, 41, 5))

    @jax.jit
    def both(q, k, v, g):
        out, pull = jax.vjp(attention_jax, q, k, v)
        return out, pull(g)

    return q, k, v, g, *both(q, k, v, g)


@pytest.mark.parametrize("lead", [(), (2, 2)])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_attention_and_its_gradient(chunk, lead):
    q, k, v, g, out, gradients = attention_in_jax(lead)
    assert_close(causal_attention(q, k, v), out)
    assert_close(tuple(stream_attention_vjp(q, k, v, g, chunk=chunk)), gradients)


def test_attention_longer_than_one_slice_of_the_forward_pass():
    q, k, v = np.random.default_rng(1).normal(size=(3, 2, 600, 4))
    assert_close(causal_attention(q, k, v), attention_jax(q, k, v))


@reference
def block_in_jax(batch):
    p = init_block(12, n_heads=3, d_ff=20, rng=0)
    p["norm1"], p["norm2"] = np.random.default_rng(2).uniform(0.5, 2, (2, 12))
    x, g = np.random.default_rng(3).normal(size=(2, *batch, 41, 12))

    @jax.jit
    def both(p, x, g):
        out, pull = jax.vjp(lambda p, x: block_jax(p, x, 3), p, x)
        return out, pull(g)

    return p, x, g, *both(p, x, g)


@pytest.mark.parametrize("cache_kv", [True, False])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("batch", [(), (2,)])
def test_block_gradient(chunk, cache_kv, batch):
    p, x, g, out, gradients = block_in_jax(batch)
    assert_close(block_forward(p, x, n_heads=3), out)
    result = stream_block_vjp(p, x, g, n_heads=3, chunk=chunk, cache_kv=cache_kv)
    assert_close(tuple(result), gradients)


def test_block_gradient_against_finite_differences():
    p, rng = init_block(6, n_heads=2, d_ff=8, rng=0), np.random.default_rng(4)
    x, g = rng.normal(size=(2, 9, 6))
    result = stream_block_vjp(p, x, g, n_heads=2, chunk=4)
    for name, step in (("x", 1e-6), *((key, 1e-6) for key in p)):
        direction = rng.normal(size=(x if name == "x" else p[name]).shape)
        ends = []
        for sign in (1, -1):
            moved, there = dict(p), x
            if name == "x":
                there = x + sign * step * direction
            else:
                moved[name] = p[name] + sign * step * direction
            ends.append((g * block_forward(moved, there, n_heads=2)).sum())
        slope = (result.x if name == "x" else result.params[name]) * direction
        assert slope.sum() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6, abs=1e-7)


@reference
def language_model_in_jax():
    params = StreamLM(**{**SIZES, "vocab": 31, "d": 8}).init(0)
    rng = np.random.default_rng(1)
    tokens, weights = rng.integers(0, 31, (2, 24)), rng.random((2, 23))
    gradient = jax.jit(jax.value_and_grad(functools.partial(lm_jax, n_heads=2)))
    return params, tokens, weights, *gradient(params, tokens, weights)


@pytest.mark.parametrize(("layer_chunk", "logits_chunk"), [(1, 1), (7, 5), (16, 64), (500, 500)])
def test_language_model_gradient(layer_chunk, logits_chunk):
    params, tokens, weights, value, gradients = language_model_in_jax()
    model = StreamLM(vocab=31, d=8, n_layers=2, n_heads=2, layer_chunk=layer_chunk, logits_chunk=logits_chunk)
    loss, ours = model.value_and_grad(params, tokens, weights=weights)
    assert loss == pytest.approx(float(value), rel=1e-12)
    assert_close(ours, gradients)
    assert model.loss(params, tokens) == pytest.approx(model.value_and_grad(params, tokens)[0], rel=1e-13)
    one, grads = model.value_and_grad(params, tokens[0], weights=weights[0])  # a text by itself: a batch of one
    batch, same = model.value_and_grad(params, tokens, weights=weights * [[1], [0]])
    assert one == pytest.approx(batch, rel=1e-12)
    assert_close(grads, same)


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 10))
def test_any_partition_gives_the_same_gradient(length, chunk, seed):
    rng = np.random.default_rng(seed)
    p = init_block(4, n_heads=2, d_ff=5, rng=rng)
    x, g = rng.normal(size=(2, length, 4))
    whole = stream_block_vjp(p, x, g, n_heads=2, chunk=length)
    for cache_kv in (True, False):
        parts = stream_block_vjp(p, x, g, n_heads=2, chunk=chunk, cache_kv=cache_kv)
        assert_close(tuple(parts), tuple(whole), tol=1e-12)


@given(st.integers(1, 20), st.integers(0, 10))
def test_gradients_of_logits_sum_to_zero(length, seed):
    """Adding a constant to all logits changes nothing: each row of the head's weight gradient sums to zero."""
    h, W, t, _ = head_problem(T=length, seed=seed)
    np.testing.assert_allclose(stream_lm_head(h, W, t, chunk=3).grad_W.sum(axis=1), 0, atol=1e-13)


def test_later_rows_do_not_feel_an_earlier_output():
    """Causality: a gradient at row 10 reaches rows 0 to 10, all of them, and none after."""
    p, x = init_block(4, n_heads=2, rng=0), np.random.default_rng(5).normal(size=(20, 4))
    g = np.zeros_like(x)
    g[10] = 1
    dx = stream_block_vjp(p, x, g, n_heads=2, chunk=3).x
    assert (np.abs(dx[:11]).max(axis=1) > 0).all() and (dx[11:] == 0).all()


def test_single_precision_stays_single_and_close():
    model = StreamLM(vocab=31, d=8, n_layers=2, n_heads=2, layer_chunk=7, logits_chunk=5)
    params, tokens = model.init(0), np.random.default_rng(1).integers(0, 31, 60)
    single = jax.tree.map(lambda w: w.astype(np.float32), params)
    _, exact = model.value_and_grad(params, tokens)
    _, grads = model.value_and_grad(single, tokens)
    assert all(g.dtype == np.float32 for g in jax.tree.leaves(grads))
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(exact), strict=True):
        assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b)


def test_every_backend_agrees(xp_array):
    def back(tree):
        leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: kind_of(leaf) is not None)
        assert {kind_of(leaf) for leaf in leaves} == {xp_array.kind}
        return [to_numpy(leaf) for leaf in leaves]

    h, W, t, rng = head_problem(T=20)  # two slices of one size everywhere: JAX compiles each operation once
    w, old = rng.random(20), -3 * rng.random(20)
    a, b, n = xp_array(h), xp_array(W), xp_array(t)
    weights, before = xp_array(w), xp_array(old)
    assert_close(
        back(stream_lm_head(a, b, n, chunk=10, weights=weights)[1:]),
        stream_lm_head(h, W, t, chunk=20, weights=w)[1:],
    )
    assert_close(
        back(stream_dpo_head(a, n, a[:10, :], n[:10], b, ref_w=-9.0, ref_l=-3.0, chunk=10)[1:4]),
        stream_dpo_head(h, t, h[:10], t[:10], W, ref_w=-9.0, ref_l=-3.0)[1:4],
    )
    assert_close(
        back(stream_grpo_head(a, b, n, old_logp=before, ref_logp=before, advantage=0.5, chunk=10)[1:]),
        stream_grpo_head(h, W, t, old_logp=old, ref_logp=old, advantage=0.5)[1:],
    )
    q, k, v, g = rng.normal(size=(4, 2, 16, 3))
    args = [xp_array(z) for z in (q, k, v, g)]
    assert_close(back(causal_attention(*args[:3])), causal_attention(q, k, v))
    assert_close(back(tuple(stream_attention_vjp(*args, chunk=8))), tuple(stream_attention_vjp(q, k, v, g, chunk=16)))
    if xp_array.kind == "jax":
        return  # what follows is made of the parts above, and compiles for ten seconds
    p, (x, gx) = init_block(6, n_heads=2, rng=0), rng.normal(size=(2, 16, 6))
    p_there = jax.tree.map(xp_array, p)
    ours = stream_block_vjp(p_there, xp_array(x), xp_array(gx), n_heads=2, chunk=8, cache_kv=False)
    assert_close(back(tuple(ours)), tuple(stream_block_vjp(p, x, gx, n_heads=2, chunk=16)))
    assert_close(back(block_forward(p_there, xp_array(x), n_heads=2)), block_forward(p, x, n_heads=2))
    model = StreamLM(vocab=23, d=6, n_layers=1, n_heads=2, layer_chunk=8, logits_chunk=8)
    params, tokens = model.init(0), t[:17]
    there = jax.tree.map(xp_array, params)
    loss, grads = model.value_and_grad(there, xp_array(tokens))
    expected_loss, expected = model.value_and_grad(params, tokens)
    assert loss == pytest.approx(expected_loss) and model.loss(there, tokens) == pytest.approx(expected_loss)
    assert_close(back(grads), expected)


def test_strided_views_are_welcome():
    """Heads cut out of a wider array, targets every other one of a longer list."""
    big = np.random.default_rng(0).normal(size=(4, 30, 2, 5))
    q, k, v, g = (np.swapaxes(z, 0, 1) for z in big)
    assert_close(tuple(stream_attention_vjp(q, k, v, g, chunk=7)),
                 tuple(stream_attention_vjp(*(z.copy() for z in (q, k, v, g)), chunk=30)))  # fmt: skip
    h, W, t, _ = head_problem(T=40)
    assert_close(stream_lm_head(h[::2], W.T.copy().T, t[::2], chunk=3)[1:],
                 stream_lm_head(h[::2].copy(), W, t[::2].copy(), chunk=20)[1:])  # fmt: skip


def test_same_answer_whatever_the_number_of_threads(assert_threads_agree):
    code = (
        "import numpy as np; from threadpoolctl import threadpool_limits;"
        "from algokit.training.streaming_backpropagation import StreamLM;"
        "m = StreamLM(vocab=97, d=16, n_layers=2, n_heads=4, layer_chunk=20, logits_chunk=9);"
        "limit = threadpool_limits(1);"  # of BLAS, whose own sums may depend on it
        "loss, g = m.value_and_grad(m.init(0), np.random.default_rng(1).integers(0, 97, 120));"
        "print(loss, g['embed'].tobytes().hex(), g['blocks'][0]['wk'].tobytes().hex())"
    )
    assert_threads_agree(code)


def test_exponential_of_the_kernels():
    x = np.concatenate([np.linspace(-700, 700, 4001), [0.0, -1e-300, 1e-17, -1e9]])
    ours = np.array([tiles._exp(v) for v in x])
    np.testing.assert_allclose(ours[:-1], np.exp(x[:-1]), rtol=4e-16)
    assert 0 <= ours[-1] < 1e-300


def test_gelu_kernels_match_their_array_form():
    u, g = np.random.default_rng(0).normal(0, 5, (2, 7, 9))
    out, pull = jax.vjp(lambda u: jax.nn.gelu(u, approximate=True), u)
    assert_close(tiles.gelu(u), out)
    assert_close(tiles.gelu(jnp.asarray(u)), out)
    assert_close(tiles.gelu_vjp(jnp.asarray(u), jnp.asarray(g)), pull(g)[0])
    assert_close(tiles.gelu_vjp(u, g.copy()), pull(g)[0])
    assert np.isfinite(tiles.gelu(np.array([[-1e6, 1e6]]))).all()


def score_entries(length, chunk, monkeypatch):
    """Entries of the score matrices that the attention's backward pass forms."""
    seen = []
    attend = tiles.attend

    def counting(q, k, *rest, **named):
        seen.append(q.shape[-2] * k.shape[-2])
        return attend(q, k, *rest, **named)

    monkeypatch.setattr(tiles, "attend", counting)
    x = np.random.default_rng(0).normal(size=(length, 2))
    stream_attention_vjp(x, x, x, x, chunk=chunk)
    monkeypatch.setattr(tiles, "attend", attend)
    return sum(seen)


@pytest.mark.parametrize("parts", [1, 2, 3, 8, 48])
def test_half_of_the_scores_are_never_formed(parts, monkeypatch):
    assert score_entries(48, 48 // parts, monkeypatch) * 2 * parts == 48**2 * (parts + 1)


def peak_bytes(model, params, tokens):
    model.value_and_grad(params, tokens[:3])  # compiled
    tracemalloc.start()
    model.value_and_grad(params, tokens)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("length", [200, 800])
@pytest.mark.parametrize(("layer_chunk", "logits_chunk"), [(25, 16), (100, 64), (10_000, 10_000)])
def test_memory_is_what_the_model_of_memory_says(length, layer_chunk, logits_chunk):
    size = dict(d=32, n_layers=2, n_heads=4, vocab=1000)
    model = StreamLM(**size, layer_chunk=layer_chunk, logits_chunk=logits_chunk)
    tokens = np.random.default_rng(0).integers(0, 1000, length + 1)
    measured = peak_bytes(model, model.init(0), tokens)
    predicted = activation_bytes(
        length, **size, d_ff=128, method="stream", layer_chunk=layer_chunk, logits_chunk=logits_chunk
    )
    assert measured == pytest.approx(predicted["peak"], rel=0.25)


def test_memory_parts_add_up():
    size = dict(d=64, d_ff=256, vocab=4096, n_layers=3, n_heads=4)
    plain, checkpoint = (activation_bytes(512, **size, method=m) for m in ("plain", "checkpoint"))
    whole = activation_bytes(512, **size, method="stream", layer_chunk=512, logits_chunk=9999)
    assert whole == checkpoint and plain["peak"] > 2 * checkpoint["peak"]
    half = activation_bytes(512, **size, method="stream", layer_chunk=64, logits_chunk=64, itemsize=4)
    assert half["gradients"] * 2 == checkpoint["gradients"] and half["peak"] * 5 < checkpoint["peak"]


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda: stream_lm_head(H, W, T3, chunk=0), "chunk"),
        (lambda: stream_lm_head(H, W, T3 + 2, chunk=1), "targets"),
        (lambda: stream_lm_head(H, W, T3[:2], chunk=1), "same length"),
        (lambda: stream_lm_head(H, W[:1], T3, chunk=1), "agree in d"),
        (lambda: stream_lm_head(H, W.astype(np.float32), T3, chunk=1), "dtype"),
        (lambda: stream_lm_head(H, W, T3, chunk=1, weights=np.zeros(3)), "positive, finite sum"),
        (lambda: stream_lm_head(H, W, T3, chunk=1, weights=-np.ones(3)), "weights"),
        (lambda: stream_grpo_head(H, W, T3, old_logp=-LOGP, ref_logp=LOGP, advantage=1.0), "old_logp"),
        (lambda: stream_dpo_head(H, T3, H, T3, W, ref_w=1.0, ref_l=-1.0), "ref_w"),
        (lambda: stream_attention_vjp(Q, K, V[:2], G, chunk=1), "v must"),
        (lambda: init_block(5, n_heads=2), "n_heads"),
        (lambda: block_forward({}, X3, n_heads=2), "params"),
        (lambda: small_model().loss(small_model().init(0), [1]), "two tokens"),
        (lambda: small_model().loss(small_model().init(0), [1, 5]), "tokens"),
        (lambda: activation_bytes(8, d=4, d_ff=6, vocab=5, n_layers=2, n_heads=3, method="plain"), "n_heads"),
    ],
)
def test_what_is_refused(call, part):
    with pytest.raises(ValueError, match=part):
        call()


def test_kinds_must_not_mix():
    with pytest.raises(TypeError, match="W must be an array of the kind of h"):
        stream_lm_head(H, jnp.asarray(W), T3, chunk=1)


def test_edges():
    one = stream_lm_head(H[:1], W, T3[:1], chunk=3)
    assert one.grad_h.shape == (1, 2)
    assert stream_attention_vjp(Q[:1], K[:1], V[:1], G[:1], chunk=1).q == pytest.approx(0)  # softmax of one is one
    zero = stream_lm_head(H, W, T3, chunk=2, weights=np.zeros(3), normalize=False)
    assert zero.loss == 0 and not zero.grad_W.any()


def test_the_module_loads_neither_jax_nor_cupy():
    code = (
        "import sys, algokit.training.streaming_backpropagation;sys.exit('jax' in sys.modules or 'cupy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
