"""What the bilevel chapters share: derivatives against differences, known solutions against brute force."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from algokit.arrays import kind_of, to_numpy
from algokit.bilevel import _softmax
from algokit.bilevel.problems import (
    BilevelProblem,
    check_problem,
    check_start,
    cleaning_data,
    cleaning_problem,
    implicit_hypergradient,
    jax_gradient,
    merely_convex_toy,
    quadratic_problem,
    softmax_fit,
    softmax_pass,
    unrolled_hypergradient,
    with_derivatives,
)

TOY = merely_convex_toy(2).problem
POINT = dict(problem=TOY, x=np.array([0.5, 1.0]), y=np.ones((2, 2)))

EXAMPLES = {
    "merely_convex_toy": dict(n=2),
    "quadratic_problem": dict(n=3, m=4, rng=0),
    "cleaning_data": dict(n_train=60, n_val=20, noise=0.5, rng=0),
    "cleaning_problem": dict(data=cleaning_data(60, 20)),
    "check_problem": dict(problem=TOY),
    "check_start": dict(**POINT),
    "with_derivatives": dict(problem=TOY),
    "jax_gradient": dict(value=TOY.F),
    "softmax_pass": dict(
        X=np.ones((3, 2)), labels=np.array([0, 1, 1]), weights=np.ones(3), Y=np.ones((2, 2)), V=np.ones((2, 2))
    ),
    "softmax_fit": dict(X=np.ones((3, 2)), labels=np.array([0, 1, 1]), weights=np.ones(3), n_classes=2, ridge=0.1),
    "unrolled_hypergradient": dict(
        problem=TOY, x=np.array([0.5, 1.0]), y0=np.ones((2, 2)), n_steps=3, step=0.5
    ),
    "implicit_hypergradient": dict(**POINT, n_terms=3, solver="neumann", step=0.5),
}  # fmt: skip


def differences(function, at, h=1e-6):
    """Central differences of a scalar function."""
    grad = np.empty_like(at)
    for i in np.ndindex(*at.shape):
        up, down = at.copy(), at.copy()
        up[i] += h
        down[i] -= h
        grad[i] = (function(up) - function(down)) / (2 * h)
    return grad


PROBLEMS = {
    "toy": (TOY, (2,), (2, 2)),
    "quadratic": (quadratic_problem(3, 4).problem, (3,), (4,)),
    "cleaning": (cleaning_problem(cleaning_data(13, 6)), (13,), (10, 65)),
}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("level", "Ff")
def test_derivatives_match_finite_differences(name, level):
    problem, shape_x, shape_y = PROBLEMS[name]
    rng = np.random.default_rng(0)
    x, y, v = rng.normal(size=shape_x), 0.3 * rng.normal(size=shape_y), rng.normal(size=shape_y)
    value, first = getattr(problem, level), getattr(problem, f"d{level}")
    gx, gy = first(x, y)
    np.testing.assert_allclose(gx, differences(lambda x: value(x, y), x), atol=1e-7)
    np.testing.assert_allclose(gy, differences(lambda y: value(x, y), y), atol=1e-7)
    hx, hy = getattr(problem, f"hvp_{level}")(x, y, v)
    np.testing.assert_allclose(hx, differences(lambda x: (first(x, y)[1] * v).sum(), x), atol=1e-7)
    along = (first(x, y + 1e-6 * v)[1] - first(x, y - 1e-6 * v)[1]) / 2e-6
    np.testing.assert_allclose(hy, along, atol=1e-6)
    both = getattr(with_derivatives(problem), f"both_{level}")(x, y, v)
    for a, b in zip(both, (gx, gy, hx, hy), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-14)


def test_missing_derivatives_come_from_jax():
    pytest.importorskip("jax")
    bare = with_derivatives(BilevelProblem(TOY.F, TOY.f))
    rng = np.random.default_rng(1)
    x, y, v = rng.normal(size=2), rng.normal(size=(2, 2)), rng.normal(size=(2, 2))
    for dtype, tol in ((np.float64, 1e-14), (np.float32, 1e-6)):
        a, b, c = x.astype(dtype), y.astype(dtype), v.astype(dtype)
        for level in "Ff":
            found = getattr(bare, f"both_{level}")(a, b, c)
            expected = getattr(with_derivatives(TOY), f"both_{level}")(a, b, c)
            for one, other in zip(found, expected, strict=True):
                assert one.dtype == dtype and kind_of(one) == "numpy"
                np.testing.assert_allclose(one, other, atol=tol)


def test_jax_gradient_of_nested_dicts():
    pytest.importorskip("jax")
    gradient = jax_gradient(lambda x, y: (x * y["a"]).sum() + (y["b"]["c"] ** 2).sum())
    gx, gy = gradient(np.ones(2), {"a": np.array([3.0, 4.0]), "b": {"c": np.ones(3)}})
    assert gx.tolist() == [3, 4] and gy["a"].tolist() == [1, 1] and gy["b"]["c"].tolist() == [2, 2, 2]
    assert gx.dtype == gy["a"].dtype == np.float64


def test_known_solutions_minimise_the_reduced_problem():
    known = quadratic_problem(4, 5, rng=3)

    A = np.array([known.problem.hvp_f(known.x, known.y, e)[1] for e in np.eye(5)])
    B = -np.array([known.problem.hvp_f(known.x, known.y, e)[0] for e in np.eye(5)]).T
    best = minimize(lambda x: known.problem.F(x, np.linalg.solve(A, B.T @ x)), np.zeros(4), tol=1e-10).x
    np.testing.assert_allclose(known.x, best, atol=1e-5)
    np.testing.assert_allclose(known.problem.df(known.x, known.y)[1], 0, atol=1e-12)
    toy = merely_convex_toy(3)
    assert toy.problem.F(toy.x, toy.y) == 0 and not toy.problem.df(toy.x, toy.y)[1].any()


@pytest.mark.parametrize("seed", range(3))
def test_hypergradients_match_the_reduced_problem(seed):
    known = quadratic_problem(4, 5, rng=seed)
    x = np.random.default_rng(seed).normal(size=4)
    A = np.array([known.problem.hvp_f(x, known.y, e)[1] for e in np.eye(5)])
    B = -np.array([known.problem.hvp_f(x, known.y, e)[0] for e in np.eye(5)]).T
    solve = lambda x: np.linalg.solve(A, B.T @ x)  # noqa: E731
    exact = differences(lambda x: known.problem.F(x, solve(x)), x)
    y = solve(x)
    np.testing.assert_allclose(implicit_hypergradient(known.problem, x, y, n_terms=5).grad_x, exact, atol=1e-8)
    neumann = implicit_hypergradient(known.problem, x, y, n_terms=200, solver="neumann", step=0.5)
    np.testing.assert_allclose(neumann.grad_x, exact, atol=1e-8)
    unrolled = unrolled_hypergradient(known.problem, x, 0 * y, n_steps=200, step=0.5)
    np.testing.assert_allclose(unrolled.grad_x, exact, atol=1e-8)
    np.testing.assert_allclose(unrolled.y, y, atol=1e-10)


@given(st.integers(0, 6), st.integers(0, 10_000))
def test_unrolled_hypergradient_differentiates_the_iterate(n_steps, seed):
    problem = PROBLEMS["cleaning"][0]
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=13), 0.1 * rng.normal(size=(10, 65))
    direction = rng.normal(size=13)
    value = lambda t: unrolled_hypergradient(problem, x + t * direction, y, n_steps=n_steps, step=1.0).value  # noqa: E731
    slope = (value(1e-5) - value(-1e-5)) / 2e-5
    found = unrolled_hypergradient(problem, x, y, n_steps=n_steps, step=1.0)
    assert (found.grad_x * direction).sum() == pytest.approx(slope, abs=1e-8)


@given(st.integers(1, 11), st.integers(1, 9), st.integers(1, 5), st.booleans(), st.integers(0, 10_000))
def test_kernel_agrees_with_array_arithmetic(n, d, c, second, seed):
    rng = np.random.default_rng(seed)
    X, Y, V = rng.normal(size=(n, d)), rng.normal(size=(c, d)), rng.normal(size=(c, d))
    labels, weights = rng.integers(0, c, n), rng.normal(size=n)
    found = softmax_pass(X, labels, weights, Y, V if second else None)
    expected = _softmax._arrays(X, labels, weights, Y, V if second else None)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-10)


def test_huge_logits_do_not_overflow():
    one = softmax_pass(np.array([[1.0]]), np.array([1]), np.ones(1), np.array([[900.0], [-900.0]]))
    assert one.losses[0] == 1800.0 and np.isfinite(one.gradient).all()


def test_pass_on_every_backend(xp_array):
    rng = np.random.default_rng(0)
    X, Y, V = rng.normal(size=(9, 4)), rng.normal(size=(3, 4)), rng.normal(size=(3, 4))
    labels, weights = rng.integers(0, 3, 9), rng.random(9)
    found = softmax_pass(*map(xp_array, (X, labels, weights, Y, V)))
    for one, other in zip(found, softmax_pass(X, labels, weights, Y, V), strict=True):
        assert kind_of(one) == xp_array.kind
        np.testing.assert_allclose(to_numpy(one), other, atol=1e-12)


def test_cleaning_problem_keeps_kind_and_dtype(xp_array):
    problem, x, y = cleaning_problem(cleaning_data(12, 5)), np.full(12, 0.3), np.full((10, 65), 0.01)
    expected = problem.both_f(x, y, y)
    for one, other in zip(problem.both_f(xp_array(x), xp_array(y), xp_array(y)), expected, strict=True):
        assert kind_of(one) == xp_array.kind
        np.testing.assert_allclose(to_numpy(one), other, atol=1e-12)
    single = problem.both_F(x.astype(np.float32), y.astype(np.float32), y.astype(np.float32))
    assert {a.dtype for a in single} == {np.dtype(np.float32)}


def test_cleaning_data_has_wrong_labels_where_it_says_so():
    data = cleaning_data(300, 50, noise=0.4, rng=5)
    plain = cleaning_data(300, 50, noise=0.0, rng=5)
    assert (~data.clean).sum() == 120 and plain.clean.all()
    np.testing.assert_array_equal(data.labels != plain.labels, ~data.clean)
    np.testing.assert_array_equal(data.X_val, plain.X_val)
    assert len(data.X_train) + len(data.X_val) + len(data.X_test) == 1797


def test_softmax_fit_agrees_with_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    data = cleaning_data(200, 50)
    w = np.random.default_rng(0).random(200)
    found = softmax_fit(data.X_train, data.labels, weights=w, ridge=0.01)
    peer = LogisticRegression(C=1 / (0.01 * w.sum()), fit_intercept=False, tol=1e-8, max_iter=5000)
    peer.fit(data.X_train, data.labels, sample_weight=w)
    np.testing.assert_allclose(found, peer.coef_, atol=2e-3)


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda: softmax_pass(np.ones((2, 2)), [0, 5], np.ones(2), np.ones((2, 2))), "labels"),
        (lambda: softmax_pass(np.ones((2, 2)), [0, 1], np.ones(2), np.ones((2, 3))), "Y"),
        (lambda: softmax_fit(np.ones((2, 2)), [0, 1], weights=np.zeros(2)), "weights"),
        (lambda: cleaning_data(1700, 100), "n_val"),
        (lambda: implicit_hypergradient(TOY, np.ones(2), np.ones((2, 2)), n_terms=2, solver="lu"), "solver"),
    ],
)
def test_what_is_refused(call, part):
    with pytest.raises(ValueError, match=part):
        call()


def test_a_problem_is_made_of_callables():
    with pytest.raises(TypeError, match="callables"):
        check_problem(dataclasses.replace(TOY, dF=3))
    with pytest.raises(TypeError, match="problem"):
        check_problem("toy")
    with pytest.raises(ValueError, match=r"b1 and b2 must fit problem.*gradients of shapes"):
        check_start(TOY, np.zeros(1), np.zeros((2, 2)), ("b1", "b2"))


def test_same_answer_whatever_the_number_of_threads(assert_threads_agree):
    code = (
        "import numpy as np; from algokit.bilevel.problems import *;"
        "p = cleaning_problem(cleaning_data()); x = np.linspace(-1, 1, 800); y = np.ones((10, 65)) * x[:65];"
        "print(b''.join(a.tobytes() for a in p.both_f(x, y, y)).hex())"
    )
    assert_threads_agree(code)
