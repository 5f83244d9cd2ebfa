"""Online subspace descent: against a plain NumPy reference, optax, JAX's gradients, and its invariants."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from algokit.arrays import kind_of, to_numpy
from algokit.training.online_subspace_descent import (
    OnlineSubspaceState,
    adam_hamiltonian,
    choose_side,
    online_subspace_adamw,
    pca_loss,
    subspace_overlap,
)

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
jnp = jax.numpy

EXAMPLES = {
    "online_subspace_adamw": dict(
        rank=2, lr=1e-3, proj_lr=5e-3, update="online_pca", inner="adam", proj_optimizer="adam", gap=200, start="svd",
        scale=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, proj_weight_decay=0.1, ortho=0.1, retract=False,
        rng=0,
    ),
    "pca_loss": dict(P=np.eye(4, 2), G=np.arange(12.0).reshape(4, 3), ortho=0.5, normalize=True),
    "choose_side": dict(shape=(3, 4)),
    "subspace_overlap": dict(P=np.eye(4, 2), U=np.eye(4, 2) + 0.1),
    "adam_hamiltonian": dict(loss=1.0, m=np.ones((2, 3)), v=np.ones((2, 3)), a=1.0, eps=0.1),
}  # fmt: skip


@pytest.fixture(autouse=True)
def double_precision():
    x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    with x64(True):
        yield


def frame(n, k, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, k)))[0]


def direct_loss(P, G, ortho, normalize=True):
    """The loss from its definition; NumPy or JAX."""
    A = G / jnp.sqrt((G * G).sum()) if normalize else G
    return ((P @ (P.T @ A) - A) ** 2).sum() + ortho * ((P.T @ P - jnp.eye(P.shape[1])) ** 2).sum()


# pca_loss


VALUE_AND_GRAD = jax.jit(jax.value_and_grad(direct_loss), static_argnums=3)


@given(
    shape=st.sampled_from([(1, 1, 1), (5, 3, 2), (4, 7, 4)]),
    ortho=st.floats(0, 3),
    normalize=st.booleans(),
    seed=st.integers(0, 999),
)
def test_loss_and_gradient_are_those_of_the_definition(shape, ortho, normalize, seed):
    (n, m, k), rng = shape, np.random.default_rng(seed)
    P, G = rng.normal(size=(n, k)), rng.normal(size=(n, m))
    value, grad = VALUE_AND_GRAD(jnp.asarray(P), jnp.asarray(G), ortho, normalize)
    ours = pca_loss(P, G, ortho=ortho, normalize=normalize)
    assert ours.value == pytest.approx(float(value), rel=1e-10, abs=1e-12)
    np.testing.assert_allclose(ours.grad, grad, rtol=1e-9, atol=1e-9 * float(abs(grad).max() + 1))


@given(scale=st.floats(1e-30, 1e30), seed=st.integers(0, 99))
def test_a_normalised_loss_does_not_see_the_size_of_the_gradient(scale, seed):
    rng = np.random.default_rng(seed)
    P, G = rng.normal(size=(5, 2)), rng.normal(size=(5, 6))
    a, b = pca_loss(P, G), pca_loss(P, scale * G)
    assert a.value == pytest.approx(b.value)
    np.testing.assert_allclose(a.grad, b.grad, rtol=1e-9, atol=1e-12)


def test_leading_singular_vectors_are_the_minimum_and_others_are_saddles():
    """Loss of any set of singular vectors: the energy left out; its gradient vanishes there (Baldi and Hornik)."""
    G = np.random.default_rng(1).normal(size=(6, 9))
    U, s, _ = np.linalg.svd(G, full_matrices=False)
    share = s**2 / (s**2).sum()
    for chosen in ([0, 1], [0, 3], [4, 5]):
        loss = pca_loss(U[:, chosen], G, ortho=0.7)
        assert loss.value == pytest.approx(1 - share[chosen].sum())
        assert np.abs(loss.grad).max() < 1e-13
    best = pca_loss(U[:, :2], G).value
    rng = np.random.default_rng(2)
    assert all(pca_loss(rng.normal(size=(6, 2)) * 10.0 ** rng.uniform(-2, 1), G).value > best for _ in range(200))


def test_loss_by_hand():
    """P = e1 / 2, G = diag(4, 3), λ = 1: A = diag(0.8, 0.6), loss (1/4 - 1)² 0.64 + 0.36 + (1/4 - 1)²."""
    loss = pca_loss(np.array([[0.5], [0.0]]), np.diag([4.0, 3.0]), ortho=1.0)
    assert loss.value == pytest.approx(0.5625 * 0.64 + 0.36 + 0.5625)
    np.testing.assert_allclose(loss.grad, [[-2 * 0.75 * 0.64 + -2 * 0.75], [0]], atol=1e-15)


def test_zero_gradient_leaves_only_the_penalty():
    P = 2 * np.eye(3, 1)
    assert pca_loss(P, np.zeros((3, 4))).value == 0
    assert pca_loss(P, np.zeros((3, 4)), ortho=1.0).value == 9
    assert not pca_loss(P, np.zeros((3, 4))).grad.any()


def test_every_kind_of_array(xp_array):
    P, G = np.random.default_rng(0).normal(size=(5, 2)), np.random.default_rng(1).normal(size=(5, 7))
    ours = pca_loss(xp_array(P), xp_array(G), ortho=0.3)
    assert kind_of(ours.grad) == xp_array.kind
    expected = pca_loss(P, G, ortho=0.3)
    assert isinstance(ours.value, float) and ours.value == pytest.approx(expected.value)
    np.testing.assert_allclose(to_numpy(ours.grad), expected.grad, rtol=1e-10)
    assert subspace_overlap(xp_array(P), xp_array(G[:, :2])) == pytest.approx(subspace_overlap(P, G[:, :2]))
    assert adam_hamiltonian(1.0, xp_array(P), xp_array(P**2), a=0.5) == pytest.approx(1 + np.abs(P).sum())


def test_single_precision_stays():
    P, G = frame(5, 2).astype(np.float32), np.ones((5, 3), np.float32)
    assert pca_loss(P, G, ortho=1.0).grad.dtype == np.float32


def test_kinds_are_not_mixed():
    with pytest.raises(TypeError, match="P and G"):
        pca_loss(np.eye(3, 1), jnp.ones((3, 2)))
    with pytest.raises(TypeError, match="P and U"):
        subspace_overlap(np.eye(3, 1), jnp.eye(3, 1))
    with np.errstate(all="ignore"), pytest.raises(ValueError, match="overflows"):
        pca_loss(np.full((3, 1), 1e200), np.ones((3, 2)))


# The other small functions


@given(n=st.integers(2, 8), k=st.integers(1, 3), seed=st.integers(0, 999))
def test_overlap_is_a_property_of_the_spans(n, k, seed):
    k = min(k, n - 1)
    rng = np.random.default_rng(seed)
    P, U, mix = rng.normal(size=(n, k)), rng.normal(size=(n, k)), rng.normal(size=(k, k)) + 3 * np.eye(k)
    value = subspace_overlap(P, U)
    assert 0 <= value <= 1
    assert value == pytest.approx(subspace_overlap(U, P))
    assert value == pytest.approx(subspace_overlap(P @ mix, 7 * U), rel=1e-6, abs=1e-9)
    assert subspace_overlap(P, P @ mix) == pytest.approx(1)
    rest = np.linalg.svd(P)[0][:, k:]
    assert subspace_overlap(P, rest) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="independent"):
        subspace_overlap(P, np.hstack([U[:, :1], U[:, :1]]) if n > 1 else U)


def test_sides():
    assert [choose_side(s) for s in ((2, 3), (3, 3), (4, 3))] == ["left", "right", "right"]
    for bad in ((3,), (0, 2), "ab", (1.5, 2)):
        with pytest.raises((TypeError, ValueError), match="shape"):
            choose_side(bad)


def test_hamiltonian_never_increases_although_the_subspace_turns():
    """Adam's ODE on a quadratic; P rotates by a generator that has nothing to do with the loss."""
    rng = np.random.default_rng(0)
    X, Y, S = rng.normal(size=(8, 4)), rng.normal(size=(8, 3)), rng.normal(size=(4, 4))
    S, P0, a, b = S - S.T, frame(4, 2), 1.0, 3.0

    def flow(t, z):
        W, m, v, P = np.split(z, [12, 18, 24])
        W, m, v, P = W.reshape(4, 3), m.reshape(2, 3), v.reshape(2, 3), P.reshape(4, 2)
        g = P.T @ (X.T @ (X @ W - Y))
        return np.concatenate([(-P @ (m / np.sqrt(v))).ravel(), (a * (g - m)).ravel(), (b * (g * g - v)).ravel(),
                               (S @ P).ravel()])  # fmt: skip

    start = np.concatenate([np.zeros(12), np.zeros(6), np.full(6, 0.1), P0.ravel()])
    run = solve_ivp(flow, (0, 4), start, rtol=1e-9, atol=1e-11, t_eval=np.linspace(0, 4, 100))
    H = [adam_hamiltonian(0.5 * np.sum((X @ z[:12].reshape(4, 3) - Y) ** 2), z[12:18], z[18:24], a=a) for z in run.y.T]
    assert run.success and np.diff(H).max() <= 1e-7 and H[-1] < 0.9 * H[0]


def test_hamiltonian_of_moments_without_energy():
    assert adam_hamiltonian(1.5, np.zeros(3), np.zeros(3)) == 1.5
    with pytest.raises(ValueError, match="v must be positive"):
        adam_hamiltonian(0.0, np.ones(2), np.zeros(2))


# The optimiser against plain NumPy


def plain_adam(g, s, betas, eps):
    b1, b2 = betas
    s["t"] += 1
    s["m"] = b1 * s["m"] + (1 - b1) * g
    s["v"] = b2 * s["v"] + (1 - b2) * g * g
    return s["m"] / (1 - b1 ** s["t"]) / (np.sqrt(s["v"] / (1 - b2 ** s["t"])) + eps)


def plain_direction(kind, g, s, betas, eps):
    if kind == "adam":
        return plain_adam(g, s, betas, eps)
    if kind == "sgd":
        return g
    if kind == "momentum":
        s["m"] = betas[0] * s["m"] + (1 - betas[0]) * g
        return s["m"]
    direction = np.sign(betas[0] * s["m"] + (1 - betas[0]) * g)
    s["m"] = betas[1] * s["m"] + (1 - betas[1]) * g
    return direction


def plain_run(W, gradients, *, rank, lr, proj_lr=5e-3, update="online_pca", inner="adam", proj_optimizer="adam",
              gap=200, scale=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, proj_weight_decay=0.0, ortho=0.0,
              retract=False):  # fmt: skip
    """One matrix, line by line as the chapter's box has it; returns the weights and projections after each step."""
    state = {"m": 0.0, "v": 0.0, "t": 0}
    proj_state = {"m": 0.0, "v": 0.0, "t": 0}
    history = []
    for t, G in enumerate(gradients):
        G = G if W.shape[0] < W.shape[1] else G.T
        if t == 0 or (update == "svd" and t % gap == 0):
            P = np.linalg.svd(G)[0][:, :rank]
        delta = scale * P @ plain_direction(inner, P.T @ G, state, betas, eps)
        delta = delta if W.shape[0] < W.shape[1] else delta.T
        W = W - lr * delta - lr * weight_decay * W
        if update == "online_pca" and t > 0:
            A = G / np.linalg.norm(G)
            E = P @ (P.T @ A) - A  # the gradient by the product rule, unsimplified
            g = 2 * E @ A.T @ P + 2 * A @ E.T @ P + 4 * ortho * P @ (P.T @ P - np.eye(rank))
            P = P - proj_lr * (plain_direction(proj_optimizer, g, proj_state, betas, eps) + proj_weight_decay * P)
            if retract:
                u, _, v = np.linalg.svd(P, full_matrices=False)
                P = u @ v
        history.append((W, P))
    return history


VARIANTS = [
    dict(),
    dict(ortho=0.5, weight_decay=0.1, proj_weight_decay=0.2, scale=0.25),
    dict(retract=True),
    dict(proj_optimizer="sgd", proj_lr=0.1),
    dict(proj_optimizer="lion"),
    dict(inner="momentum"),
    dict(inner="lion", betas=(0.9, 0.99)),
    dict(update="svd", gap=3),
    dict(update="fixed"),
    dict(betas=(0.8, 0.95), eps=1e-3),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_six_steps_are_those_of_plain_numpy(variant):
    rng = np.random.default_rng(0)
    weights = {"wide": rng.normal(size=(5, 9)), "tall": rng.normal(size=(9, 5)), "square": rng.normal(size=(6, 6))}
    gradients = {name: rng.normal(size=(6, *W.shape)) + rng.normal(size=W.shape) for name, W in weights.items()}
    expected = {name: plain_run(W, gradients[name], rank=2, lr=0.01, **variant) for name, W in weights.items()}
    optimizer = online_subspace_adamw(rank=2, lr=0.01, **variant)
    params = {name: jnp.asarray(W) for name, W in weights.items()}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for t in range(6):
        updates, state = update({name: jnp.asarray(g[t]) for name, g in gradients.items()}, state, params)
        params = {name: np.asarray(W) + np.asarray(updates[name]) for name, W in params.items()}
        for name in weights:
            W, P = expected[name][t]
            np.testing.assert_allclose(params[name], W, rtol=1e-9, atol=1e-11)
            ours = np.asarray(state.P[name])  # the signs of singular vectors are LAPACK's choice
            np.testing.assert_allclose(ours * np.sign((ours * P).sum(axis=0)), P, rtol=1e-8, atol=1e-10)


def test_adafactor_and_any_optax_transformation_move_the_projection():
    rng = np.random.default_rng(0)
    gradients = [{"W": jnp.asarray(g)} for g in rng.normal(size=(3, 5, 9))]
    params = {"W": jnp.zeros((5, 9))}

    def last(choice):
        optimizer = online_subspace_adamw(rank=2, lr=0.1, proj_optimizer=choice)
        state = optimizer.init(params)
        for g in gradients:
            _, state = optimizer.update(g, state, params)
        return np.asarray(state.P["W"])

    np.testing.assert_array_equal(last("adam"), last(optax.scale_by_adam(0.9, 0.999, 1e-8)))
    moved = last("adafactor")
    assert np.isfinite(moved).all() and 1e-4 < np.abs(moved - last(optax.set_to_zero())).max() < 0.05


def test_leaves_that_are_not_projected_get_optax_adamw():
    rng = np.random.default_rng(0)
    params = {
        "blocks": {"0": {"query": rng.normal(size=(8, 8)), "norm": rng.normal(size=8)}},
        "embedding": rng.normal(size=(20, 8)),
        "narrow": rng.normal(size=(3, 9)),  # rank >= min(shape)
        "filter": rng.normal(size=(3, 3, 4)),
    }
    params = jax.tree.map(jnp.asarray, params)
    ours = online_subspace_adamw(rank=3, lr=optax.linear_schedule(0.1, 0.0, 10), weight_decay=0.1, inner="lion")
    theirs = optax.adamw(optax.linear_schedule(0.1, 0.0, 10), weight_decay=0.1)
    a, b = params, params
    s, t = ours.init(a), theirs.init(b)
    assert list(s.P) == ["blocks/0/query"]
    step, their_step = jax.jit(ours.update), jax.jit(theirs.update)
    for i in range(4):
        grads = jax.tree.map(lambda x, i=i: jnp.asarray(np.cos(np.asarray(x) + i)), params)
        u, s = step(grads, s, a)
        a = optax.apply_updates(a, u)
        u, t = their_step(grads, t, b)
        b = optax.apply_updates(b, u)
    for name in ("embedding", "narrow", "filter"):
        np.testing.assert_allclose(a[name], b[name], rtol=1e-12)
    np.testing.assert_allclose(a["blocks"]["0"]["norm"], b["blocks"]["0"]["norm"], rtol=1e-12)
    assert not np.allclose(a["blocks"]["0"]["query"], b["blocks"]["0"]["query"])


def test_state_is_as_small_as_promised():
    n, m, k = 12, 40, 3
    params = {"a": jnp.zeros((n, m)), "b": jnp.zeros((m, n)), "bias": jnp.zeros(m)}
    for update, per_matrix in (("online_pca", 2 * k * m + 3 * n * k), ("svd", 2 * k * m + n * k)):
        state = online_subspace_adamw(rank=k, update=update).init(params)
        sizes = [x.size for x in jax.tree.leaves(state) if getattr(x, "ndim", 0) > 0]
        assert sum(sizes) == 2 * per_matrix + 2 * m


# Invariants


STEPPER = online_subspace_adamw(rank=2, lr=0.1, proj_lr=0.1)
STEP = jax.jit(STEPPER.update)


@given(seed=st.integers(0, 999))
@settings(max_examples=15)
def test_transposed_weights_take_transposed_steps(seed):
    g = np.random.default_rng(seed).normal(size=(5, 8))
    a, _ = STEP({"W": jnp.asarray(g)}, STEPPER.init({"W": jnp.asarray(g)}))
    b, _ = STEP({"W": jnp.asarray(g.T)}, STEPPER.init({"W": jnp.asarray(g.T)}))
    np.testing.assert_allclose(a["W"], b["W"].T, rtol=1e-6, atol=1e-12)


@given(seed=st.integers(0, 999))
@settings(max_examples=15)
def test_every_update_lies_in_the_span_of_the_old_projection(seed):
    rng = np.random.default_rng(seed)
    state = STEPPER.init({"W": jnp.zeros((5, 8))})
    for i in range(3):
        old = state
        updates, state = STEP({"W": jnp.asarray(rng.normal(size=(5, 8)))}, state)
        P = np.asarray(old.P["W"] if i else state.P["W"])
        basis = np.linalg.qr(P)[0]
        np.testing.assert_allclose(basis @ (basis.T @ updates["W"]), updates["W"], atol=1e-12)


def test_retraction_keeps_the_columns_orthonormal():
    optimizer = online_subspace_adamw(rank=3, proj_lr=0.1, retract=True)
    state = optimizer.init({"W": jnp.zeros((6, 8))})
    for g in np.random.default_rng(0).normal(size=(5, 6, 8)):
        _, state = optimizer.update({"W": jnp.asarray(g)}, state)
        np.testing.assert_allclose(state.P["W"].T @ state.P["W"], np.eye(3), atol=1e-12)


def test_random_frames_change_every_gap_steps_and_follow_the_seed():
    def frames(seed):
        optimizer = online_subspace_adamw(rank=2, update="random", gap=2, rng=seed)
        state, update = optimizer.init({"W": jnp.zeros((6, 8)), "V": jnp.zeros((8, 6))}), jax.jit(optimizer.update)
        seen = []
        for g in np.random.default_rng(0).normal(size=(5, 6, 8)):
            _, state = update({"W": jnp.asarray(g), "V": jnp.asarray(g.T)}, state)
            seen.append(state.P)
        return seen

    seen, again, other = frames(0), frames(0), frames(1)
    for i, same in enumerate((True, False, True, False)):
        assert np.array_equal(seen[i]["W"], seen[i + 1]["W"]) == same
    assert not np.allclose(seen[0]["W"], seen[0]["V"])
    for a, b in zip(seen, again, strict=True):
        np.testing.assert_array_equal(a["W"], b["W"])
        np.testing.assert_allclose(a["W"].T @ a["W"], np.eye(2), atol=1e-12)
    assert not np.allclose(seen[0]["W"], other[0]["W"])


def test_a_rule_of_ones_own():
    def oja(P, G, step, key):
        A = G / jnp.linalg.norm(G)
        return jnp.linalg.qr(P + 0.5 * A @ (A.T @ P))[0]

    G = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8)))
    optimizer = online_subspace_adamw(rank=2, update=oja, start="random")
    params = {"W": G.T}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for _ in range(400):
        _, state = update({"W": G.T}, state)
    assert subspace_overlap(np.asarray(state.P["W"]), np.linalg.svd(np.asarray(G))[0][:, :2]) > 0.999
    with pytest.raises(ValueError, match="update must return"):
        online_subspace_adamw(rank=2, update=lambda P, G, step, key: P[:, :1]).update(
            {"W": G.T}, online_subspace_adamw(rank=2, update="fixed").init(params)
        )


# Edges


@pytest.mark.parametrize("update", ["online_pca", "svd", "random", "fixed"])
def test_zero_gradients_move_nothing_and_make_no_nan(update):
    optimizer = online_subspace_adamw(rank=2, update=update, gap=3, ortho=1.0, proj_weight_decay=0.5)
    params = {"W": jnp.ones((5, 7))}
    zero, some = {"W": jnp.zeros((5, 7))}, {"W": jnp.asarray(np.random.default_rng(0).normal(size=(5, 7)))}
    state = optimizer.init(params)
    updates, state = optimizer.update(zero, state, params)
    np.testing.assert_array_equal(updates["W"], 0)
    np.testing.assert_allclose(state.P["W"].T @ state.P["W"], np.eye(2), atol=1e-12)  # a random frame
    _, state = optimizer.update(some, state, params)
    before = state
    _, state = optimizer.update(zero, state, params)
    np.testing.assert_array_equal(state.P["W"], before.P["W"])
    for a, b in zip(jax.tree.leaves(state.projection), jax.tree.leaves(before.projection), strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state.P, state.subspace)))


def test_dtypes_stay():
    params = {"a": jnp.ones((5, 7), jnp.float32), "b": jnp.ones((5, 7), jnp.bfloat16), "c": jnp.ones(3, jnp.float32)}
    optimizer = online_subspace_adamw(rank=2, lr=optax.linear_schedule(0.1, 0.0, 5), weight_decay=0.1)
    state = optimizer.init(params)
    grads = jax.tree.map(lambda x: x + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), params)
    updates, state = optimizer.update(grads, state, params)
    assert [updates[p].dtype for p in "abc"] == [jnp.float32, jnp.bfloat16, jnp.float32]
    assert state.P["b"].dtype == jnp.float32


def test_works_in_chains_masks_scans_and_on_any_pytree():
    params = [{"W": jnp.ones((5, 7)), "n": None}, (jnp.ones((7, 5)), jnp.ones(3))]
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(online_subspace_adamw(rank=2, lr=0.1), [{"W": True, "n": None}, (True, False)]),
    )
    loss = lambda p: sum(jnp.sum((x - 2) ** 2) for x in jax.tree.leaves(p))  # noqa: E731

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), loss(params)

    (new, state), losses = jax.jit(partial(jax.lax.scan, step, length=6))((params, optimizer.init(params)))
    assert losses[-1] < losses[0] and set(state[1].inner_state.P) == {"0/W", "1/0"}
    assert new[0]["n"] is None
    assert isinstance(state[1].inner_state, OnlineSubspaceState)


def test_trains_a_model_of_the_book():
    from algokit.nn.models import init_mlp, mlp
    from algokit.nn.training import train

    x = jnp.asarray(np.random.default_rng(0).normal(size=(32, 8)))
    loss = lambda params, batch: ((mlp(params, batch) - jnp.sin(batch)) ** 2).mean()  # noqa: E731
    optimizer = online_subspace_adamw(rank=2, lr=0.01)
    result = train(loss, init_mlp([8, 16, 8], rng=0), lambda key: x, optimizer, steps=60, rng=0)
    assert result.loss[-1] < 0.7 * result.loss[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: {"a": g["a"]}, "grads lacks 'b/c'"),
        (lambda g: {**g, "d": g["a"]}, "grads has 'd'"),
        (lambda g: {**g, "a": g["a"][:, :6]}, r"grads\['a'\] must have the shape"),
        (lambda g: {**g, "b": {"c": g["b"]["c"][:2]}}, r"grads\['b/c'\] must have the shape"),
        (lambda g: {**g, "a": g["a"].at[0, 0].set(jnp.nan)}, r"grads\['a'\] must be finite"),
        (lambda g: {**g, "b": {"c": g["b"]["c"].at[0].set(jnp.inf)}}, r"grads\['b/c'\] must be finite"),
        (lambda g: {**g, "b": {"c": 1.0}}, r"grads\['b/c'\] must be an array"),
    ],
)
@pytest.mark.parametrize("with_params", [True, False])
def test_gradients_that_do_not_fit_are_refused_with_their_path(change, message, with_params):
    params = {"a": jnp.ones((5, 7)), "b": {"c": jnp.ones(3)}}
    optimizer = online_subspace_adamw(rank=2)
    state = optimizer.init(params)
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.update(change(params), state, params if with_params else None)


def test_what_else_is_refused():
    params = {"a": jnp.ones((5, 7))}
    optimizer = online_subspace_adamw(rank=2, weight_decay=0.1)
    state = optimizer.init(params)
    with pytest.raises(ValueError, match="params must be given"):
        optimizer.update(params, state)
    with pytest.raises(TypeError, match=r"params\['a'\] must be of a floating dtype"):
        online_subspace_adamw(rank=2).init({"a": jnp.ones((5, 7), int)})
    with pytest.raises(ValueError, match="select must choose matrices"):
        online_subspace_adamw(rank=2, select=lambda path, x: True).init({"a": jnp.ones(5)})
    with pytest.raises(TypeError, match="select must return"):
        online_subspace_adamw(rank=2, select=lambda path, x: "yes").init(params)
    for name, value in dict(select=3, proj_optimizer=3, update=3, lr=-1.0, betas=(0.9, 1.0), betas_=None).items():
        if value is not None:
            with pytest.raises((TypeError, ValueError), match=name):
                online_subspace_adamw(rank=2, **{name: value})


def test_the_module_does_not_import_jax():
    code = (
        "import sys, numpy as np; from algokit.training.online_subspace_descent import pca_loss;"
        "pca_loss(np.eye(3, 1), np.ones((3, 2))); assert 'jax' not in sys.modules and 'optax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
