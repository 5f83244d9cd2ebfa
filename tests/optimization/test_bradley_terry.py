"""Bradley-Terry: every variant against brute force, peers of SciPy and scikit-learn, and the model's symmetries."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from algokit.arrays import kind_of, to_numpy
from algokit.checks import AlgokitWarning
from algokit.data import american_league_1987
from algokit.optimization import bradley_terry as module
from algokit.optimization.bradley_terry import (
    BradleyTerry,
    BradleyTerrySummary,
    bradley_terry,
    log_likelihood,
    plackett_luce,
    strongly_connected_core,
    win_matrix,
)

WINS = np.array([[0.0, 3.0, 1.0], [1.0, 0.0, 2.0], [2.0, 1.0, 0.0]])
TIES = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 2.0], [0.0, 2.0, 0.0]])
PAIRS = np.array([[0, 1], [1, 2], [2, 0], [0, 1]])
SUMMARY = BradleyTerrySummary()
LEAGUE = SUMMARY.update(SUMMARY.init(), (PAIRS[:, 0], PAIRS[:, 1]))

EXAMPLES = {
    "BradleyTerrySummary": dict(model=BradleyTerry(), n=3),
    "BradleyTerrySummary.update": (lambda: SUMMARY, dict(state=LEAGUE, chunk=WINS)),
    "BradleyTerrySummary.merge": (lambda: SUMMARY, dict(a=LEAGUE, b=LEAGUE)),
    "BradleyTerrySummary.finish": (lambda: SUMMARY, dict(state=LEAGUE)),
    "bradley_terry": dict(
        wins=WINS, ties=TIES, prior="logistic", method="newman", updates="sequential", tol=1e-6, max_sweeps=1000,
        init=np.ones(3), check=True,
    ),
    "plackett_luce": dict(
        rankings=[[0, 1, 2], [1, 0, 2], [2, 0, 1]], n=3, prior="logistic", method="newman", tol=1e-6, max_sweeps=1000,
        init=np.ones(3), check=True,
    ),
    "win_matrix": dict(winners=np.array([0, 1]), losers=np.array([1, 0]), n=2, weights=np.array([1.0, 2.0])),
    "log_likelihood": dict(wins=WINS, log_strengths=np.zeros(3)),
    "strongly_connected_core": dict(wins=sp.csr_array(WINS)),
    "BradleyTerry": dict(prior="logistic", method="newman", tol=1e-6, max_sweeps=1000),
    "BradleyTerry.fit": dict(pairs=PAIRS, sample_weight=np.ones(4)),
    "BradleyTerry.predict_proba": dict(pairs=PAIRS),
}  # fmt: skip
ACCEPTS = {  # names of players may be strings
    "BradleyTerry.fit.pairs": {"string", "zero", "negative", "huge"},
}


def cuts(n: int, seed: int) -> list[slice]:
    """A random partition of n rows into a few chunks, some of them empty."""
    bounds = np.sort(np.random.default_rng([seed, 1]).integers(0, n + 1, 4))
    return [slice(a, b) for a, b in zip([0, *bounds], [*bounds, n], strict=True)]


def league(n: int, spread: float, games: int, seed: int) -> np.ndarray:
    """Round robin of n players with log-strengths N(0, spread^2)."""
    rng = np.random.default_rng(seed)
    lam = rng.normal(0, spread, n)
    first = np.triu(rng.binomial(games, 1 / (1 + np.exp(lam - lam[:, None]))), 1).astype(float)
    return first + np.tril(games - first.T, -1)


def maximise(minus_log_posterior, n: int) -> np.ndarray:
    """Brute force: the maximum of a smooth concave function by quasi-Newton from several starts."""
    best = min((minimize(minus_log_posterior, x0, method="BFGS", options={"gtol": 1e-9}) for x0 in (np.zeros(n),
               np.linspace(-1, 1, n))), key=lambda r: r.fun)  # fmt: skip
    return best.x


METHODS = ["newman", "zermelo", 0.25, 0.5]


@pytest.mark.parametrize("method", METHODS)
def test_published_coefficients_of_the_1987_league(method):
    result = bradley_terry(american_league_1987().wins, method=method, tol=1e-12)
    published = [1.5814, 1.4364, 1.2945, 1.2476, 1.1077, 0.6839, 0.0]
    np.testing.assert_allclose(result.log_strengths - result.log_strengths[-1], published, atol=1e-4)
    assert result.converged and result.log_strengths.mean() == pytest.approx(0, abs=1e-12)


def test_two_players_are_exact_after_one_sweep():
    result = bradley_terry(np.array([[0, 3.0], [1.0, 0]]), tol=1e-12)
    np.testing.assert_allclose(result.strengths, [3**0.5, 3**-0.5], rtol=1e-14)
    assert result.n_sweeps == 2 and result.history[1] < 1e-15


@pytest.mark.parametrize("updates", ["sequential", "simultaneous"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prior", [None, "logistic"])
def test_every_variant_finds_the_brute_force_maximum(updates, method, prior):
    wins = league(6, 1.0, 9, seed=0)

    def minus(lam):
        penalty = np.logaddexp(0, lam).sum() + np.logaddexp(0, -lam).sum() if prior else lam.mean() ** 2
        return penalty - log_likelihood(wins, lam)

    result = bradley_terry(wins, updates=updates, method=method, prior=prior, tol=1e-11)
    np.testing.assert_allclose(result.log_strengths, maximise(minus, 6), atol=1e-6)
    assert result.log_likelihood == pytest.approx(log_likelihood(wins, result.log_strengths), rel=1e-12)


def davidson(wins, ties, lam, nu):
    """Davidson's log-likelihood, straight from the definition."""
    total, pi = 0.0, np.exp(lam)
    for i in range(len(lam)):
        for j in range(i + 1, len(lam)):
            draw = 2 * nu * np.sqrt(pi[i] * pi[j])
            for count, weight in ((wins[i, j], pi[i]), (wins[j, i], pi[j]), (ties[i, j], draw)):
                if count:
                    total += count * np.log(weight / (pi[i] + pi[j] + draw))
    return total


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prior", [None, "logistic"])
def test_ties_maximise_davidsons_likelihood(method, prior):
    rng = np.random.default_rng(1)
    wins = league(5, 0.7, 8, seed=1)
    ties = np.triu(rng.integers(0, 5, (5, 5)), 1)
    ties = (ties + ties.T).astype(float)

    def minus(x):
        lam, nu = x[:-1], np.exp(x[-1])
        penalty = np.logaddexp(0, lam).sum() + np.logaddexp(0, -lam).sum() if prior else lam.mean() ** 2
        return penalty - davidson(wins, ties, lam, nu)

    result = bradley_terry(wins, ties=ties, method=method, prior=prior, tol=1e-11)
    best = maximise(minus, 6)
    np.testing.assert_allclose(result.log_strengths, best[:-1], atol=1e-5)
    assert result.tie_parameter == pytest.approx(np.exp(best[-1]), rel=1e-5)
    expected = davidson(wins, ties, to_numpy(result.log_strengths), result.tie_parameter)
    assert result.log_likelihood == pytest.approx(expected, rel=1e-12)


def test_no_ties_at_all_is_plain_bradley_terry():
    plain = bradley_terry(WINS, tol=1e-12)
    tied = bradley_terry(WINS, ties=np.zeros((3, 3)), tol=1e-12)
    np.testing.assert_allclose(tied.strengths, plain.strengths, rtol=1e-10)
    assert tied.tie_parameter == 0.0 and tied.log_likelihood == pytest.approx(plain.log_likelihood)
    assert plain.tie_parameter is None


RANKINGS = [[0, 1, 2, 3], [1, 0, 3], [2, 0, 1], [3, 2, 1, 0], [0, 2], [1, 3, 2]]


def ranking_likelihood(rankings, lam):
    """Plackett-Luce log-likelihood, straight from the definition."""
    return sum(lam[r[s]] - np.log(np.exp(lam[list(r[s:])]).sum()) for r in rankings for s in range(len(r) - 1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prior", [None, "logistic"])
def test_plackett_luce_finds_the_brute_force_maximum(method, prior):
    def minus(lam):
        penalty = np.logaddexp(0, lam).sum() + np.logaddexp(0, -lam).sum() if prior else lam.mean() ** 2
        return penalty - ranking_likelihood(RANKINGS, lam)

    result = plackett_luce(RANKINGS, method=method, prior=prior, tol=1e-11)
    np.testing.assert_allclose(result.log_strengths, maximise(minus, 4), atol=1e-5)
    assert result.log_likelihood == pytest.approx(ranking_likelihood(RANKINGS, result.log_strengths), rel=1e-12)


def test_rankings_of_two_are_games():
    rng = np.random.default_rng(2)
    games = [rng.permutation(5)[:2].tolist() for _ in range(60)]
    by_rank = plackett_luce(games, n=5, tol=1e-12)
    by_game = bradley_terry(win_matrix(*np.transpose(games), n=5), tol=1e-12)
    np.testing.assert_allclose(by_rank.strengths, by_game.strengths, rtol=1e-9)
    assert by_rank.n_sweeps == by_game.n_sweeps
    assert by_rank.log_likelihood == pytest.approx(by_game.log_likelihood)


def test_logistic_regression_on_signed_incidence_rows_agrees():
    from sklearn.linear_model import LogisticRegression

    wins = league(8, 0.8, 10, seed=3)
    i, j = np.nonzero(wins)
    rows = np.zeros((len(i), 8))
    rows[np.arange(len(i)), i], rows[np.arange(len(i)), j] = 1, -1
    both, y = np.vstack([rows, -rows]), np.r_[np.ones(len(i)), np.zeros(len(i))]
    model = LogisticRegression(C=1e10, fit_intercept=False, tol=1e-10, max_iter=10_000)
    model.fit(both, y, sample_weight=np.tile(wins[i, j], 2))
    lam = model.coef_[0] - model.coef_[0].mean()
    np.testing.assert_allclose(bradley_terry(wins, tol=1e-12).log_strengths, lam, atol=1e-4)


tables = st.integers(2, 7).flatmap(
    lambda n: st.lists(st.integers(0, 6), min_size=n * n, max_size=n * n).map(
        lambda v: np.array(v, float).reshape(n, n) * (1 - np.eye(n))
    )
)


@given(tables)
def test_each_sequential_sweep_raises_the_posterior(wins):
    """Each update may only climb (with the prior, so that every table has a maximum)."""
    n = len(wins)

    def posterior(lam):
        return log_likelihood(wins, lam) - np.logaddexp(0, lam).sum() - np.logaddexp(0, -lam).sum()

    pi, before = np.ones(n), posterior(np.zeros(n))
    for _ in range(5):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AlgokitWarning)
            pi = bradley_terry(wins, prior="logistic", init=pi, max_sweeps=1, tol=1e-300).strengths
        after = posterior(np.log(pi))
        assert after >= before - 1e-10 * (1 + abs(before))
        before = after


@given(tables, st.randoms(use_true_random=False))
def test_renaming_players_renames_strengths(wins, random):
    order = list(range(len(wins)))
    random.shuffle(order)
    plain = bradley_terry(wins, prior="logistic", tol=1e-12)
    renamed = bradley_terry(wins[np.ix_(order, order)], prior="logistic", tol=1e-12)
    np.testing.assert_allclose(renamed.log_strengths, plain.log_strengths[order], atol=1e-9)


@given(tables)
def test_turning_every_result_round_inverts_strengths(wins):
    plain = bradley_terry(wins, prior="logistic", tol=1e-12)
    turned = bradley_terry(wins.T, prior="logistic", tol=1e-12)
    np.testing.assert_allclose(turned.log_strengths, -plain.log_strengths, atol=1e-9)


@given(tables)
def test_at_the_maximum_expected_wins_equal_wins(wins):
    core = strongly_connected_core(wins)
    wins = wins[np.ix_(core, core)]
    pi = bradley_terry(wins, tol=1e-13).strengths
    expected = ((wins + wins.T) * pi[:, None] / (pi[:, None] + pi)).sum(axis=1)
    np.testing.assert_allclose(expected, wins.sum(axis=1), rtol=1e-7, atol=1e-9)


@given(tables)
def test_core_is_found_and_fits_alone(wins):
    core = strongly_connected_core(wins)
    reach = (np.linalg.matrix_power(np.eye(len(wins)) + (wins > 0), len(wins)) > 0).astype(int)
    mutual = reach * reach.T
    assert mutual.sum(axis=1).max() == len(core) and mutual[np.ix_(core, core)].all()
    if len(core) == len(wins):
        assert bradley_terry(wins).converged
    else:
        with pytest.raises(ValueError, match="components"):
            bradley_terry(wins)


def test_message_lists_the_components():
    wins = np.zeros((4, 4))
    wins[0, 1] = wins[1, 0] = wins[2, 0] = 1
    with pytest.raises(ValueError, match=r"3 components: \{0, 1\}, ") as error:
        bradley_terry(wins)
    assert "prior='logistic'" in str(error.value)
    with pytest.warns(AlgokitWarning, match="no convergence"):
        assert not bradley_terry(wins, check=False, max_sweeps=5).converged


def test_players_without_games():
    wins = np.zeros((3, 3))
    wins[0, 1] = wins[1, 0] = 2
    result = bradley_terry(wins, prior="logistic", tol=1e-12)
    assert result.strengths[2] == pytest.approx(1.0)
    assert bradley_terry(np.zeros((1, 1))).strengths.tolist() == [1.0]


def test_all_equal_is_one_in_one_sweep():
    result = bradley_terry(np.ones((5, 5)) - np.eye(5))
    np.testing.assert_array_equal(result.strengths, np.ones(5))
    assert result.n_sweeps == 1


def test_simultaneous_updates_without_damping_would_oscillate_and_with_it_do_not():
    """Two players: Newman's update swaps the strengths for ever if both move at once and all the way."""
    wins = np.array([[0.0, 3.0], [1.0, 0.0]])
    undamped = [np.ones(2)]
    for _ in range(4):
        pi = undamped[-1]
        undamped.append(np.array([wins[0, 1] / wins[1, 0] * pi[1], wins[1, 0] / wins[0, 1] * pi[0]]))
    np.testing.assert_allclose(undamped[2], undamped[4])
    assert not np.allclose(undamped[3], undamped[4])
    bipartite = np.zeros((6, 6))
    bipartite[:3, 3:], bipartite[3:, :3] = [[3, 1, 2], [1, 2, 5], [2, 2, 1]], [[1, 2, 1], [3, 1, 1], [1, 4, 2]]
    for table in (wins, bipartite):
        together = bradley_terry(table, updates="simultaneous", tol=1e-12)
        np.testing.assert_allclose(together.strengths, bradley_terry(table, tol=1e-12).strengths, rtol=1e-9)


def test_huge_spreads_go_on_in_log_strengths():
    """A ladder in which each beats the next 99 times in 100: strengths span 99^300, far beyond a double."""
    n = 300
    wins = sp.diags_array([np.full(n - 1, 99.0), np.full(n - 1, 1.0)], offsets=[1, -1], shape=(n, n))
    # warm-started near the answer: the ladder is a worst case for any iteration that visits neighbours only
    truth = np.log(99.0) * (np.arange(n)[::-1] - (n - 1) / 2)
    games, _ = module._games(wins, None)
    rule = module._Rule(0.0, 0.0, 1e-13, 2000)
    lam, history = truth + np.sin(np.arange(n)) * 1e-3, np.empty(2000)
    module._sweeps_log(games, lam, rule, history, 0)
    steps = lam[:-1] - lam[1:]
    assert np.isfinite(lam).all() and np.abs(steps - np.log(99.0)).max() < 1e-2
    with pytest.warns(AlgokitWarning):  # through the front door: no overflow, whatever the sweep limit
        result = bradley_terry(wins, max_sweeps=300, tol=1e-15, init=np.exp(np.clip(truth, -600, 600)))
    assert np.isfinite(result.log_strengths).all() and np.isfinite(result.log_likelihood)


@pytest.mark.parametrize("prior", [0.0, 1.0])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_both_forms_of_the_sweep_agree(alpha, prior):
    games, _ = module._games(league(7, 2.0, 12, seed=4) + 0.1 * (1 - np.eye(7)), None)
    rule = module._Rule(alpha, prior, 1e-300, 4)
    pi, lam, a, b = np.ones(7), np.zeros(7), np.empty(4), np.empty(4)
    module._sweeps(games, pi, rule, a)
    module._sweeps_log(games, lam, rule, b, 0)
    np.testing.assert_allclose(np.log(pi), lam, rtol=1e-11)
    np.testing.assert_allclose(a, b, rtol=1e-8)


def test_dense_sparse_and_every_backend_agree(xp_array):
    expected = bradley_terry(WINS, tol=1e-10)
    result = bradley_terry(xp_array(WINS), tol=1e-10)
    assert kind_of(result.strengths) == kind_of(result.log_strengths) == xp_array.kind
    np.testing.assert_allclose(to_numpy(result.strengths), expected.strengths, rtol=1e-8)
    np.testing.assert_array_equal(bradley_terry(sp.coo_array(WINS), tol=1e-10).strengths, expected.strengths)


@pytest.mark.gpu
def test_gpu_agrees_with_the_host():
    cupy = pytest.importorskip("cupy")
    import cupyx.scipy.sparse

    wins = league(300, 1.0, 3, seed=5) + 0.01 * (1 - np.eye(300))
    for prior in (None, "logistic"):
        for method in METHODS:
            host = bradley_terry(wins, updates="simultaneous", tol=1e-10, prior=prior, method=method)
            device = bradley_terry(cupy.asarray(wins), tol=1e-10, prior=prior, method=method)
            assert kind_of(device.strengths) == "cupy" and abs(device.n_sweeps - host.n_sweeps) <= 1
            np.testing.assert_allclose(device.strengths.get(), host.strengths, rtol=1e-7)
    sparse = bradley_terry(cupyx.scipy.sparse.csr_matrix(cupy.asarray(wins)), tol=1e-10)
    np.testing.assert_allclose(sparse.strengths.get(), bradley_terry(wins, tol=1e-12).strengths, rtol=1e-6)


def test_same_answer_whatever_the_number_of_threads(assert_threads_agree):
    code = (
        "import numpy as np; from algokit.optimization.bradley_terry import bradley_terry;"
        "w = np.random.default_rng(0).integers(1, 9, (60, 60)) * (1.0 - np.eye(60));"
        "print(bradley_terry(w, updates='simultaneous').strengths.tobytes().hex())"
    )
    assert_threads_agree(code)


def test_warm_start_from_the_answer_stops_at_once():
    wins = league(20, 1.0, 10, seed=6)
    first = bradley_terry(wins, tol=1e-10)
    assert bradley_terry(wins, init=first.strengths, tol=1e-8).n_sweeps == 1


@pytest.mark.parametrize(
    ("wins", "kwargs", "part"),
    [
        (np.ones((2, 3)), {}, "square"),
        (np.eye(2), {}, "diagonal"),
        (-WINS, {}, "wins"),
        (WINS, dict(ties=WINS), "symmetric"),
        (WINS, dict(ties=np.zeros((2, 2))), "shape of wins"),
        (np.zeros((3, 3)), dict(ties=TIES, prior="logistic"), "decisive"),
        (WINS, dict(method="elo"), "method"),
        (WINS, dict(method=1.5), "method"),
        (WINS, dict(init=np.zeros(3)), "init"),
        (WINS, dict(ties=TIES, updates="simultaneous"), "updates"),
    ],
)
def test_what_is_refused(wins, kwargs, part):
    with pytest.raises(ValueError, match=part):
        bradley_terry(wins, **kwargs)


def test_malformed_rankings_are_refused():
    for rankings, part in (
        ([], "at least one"),
        ([[0, 1, 0]], "twice"),
        ([[0]], "2 element"),
        ([[0, 1]], "components"),
    ):
        with pytest.raises(ValueError, match=part):
            plackett_luce(rankings)
    with pytest.raises(TypeError, match="rankings"):
        plackett_luce("abc")


def test_win_matrix_adds_repeated_games():
    table = win_matrix([0, 0, 2], [1, 1, 0], n=4, weights=[1.0, 0.5, 2.0])
    expected = np.zeros((4, 4))
    expected[0, 1], expected[2, 0] = 1.5, 2.0
    np.testing.assert_array_equal(table.toarray(), expected)
    with pytest.raises(ValueError, match="losers"):
        win_matrix([0], [5], n=3)
    with pytest.raises(ValueError, match="differ"):
        win_matrix([1], [1])


class TestEstimator:
    games = (("ann", "bob"), ("ann", "bob"), ("bob", "cem"), ("cem", "ann"))

    def test_it_is_bradley_terry_with_names(self):
        model = BradleyTerry(prior=None, tol=1e-12).fit(self.games)
        expected = bradley_terry(win_matrix([0, 0, 1, 2], [1, 1, 2, 0]), tol=1e-12)
        assert model.classes_.tolist() == ["ann", "bob", "cem"]
        np.testing.assert_array_equal(model.strengths_, expected.strengths)
        chance = model.predict_proba([["ann", "bob"], ["bob", "ann"]])
        np.testing.assert_allclose(chance.sum(axis=1), 1)
        np.testing.assert_allclose(chance[0], chance[1, ::-1])
        a, b, _ = model.strengths_
        assert chance[0, 0] == pytest.approx(a / (a + b))

    def test_weights_are_repeated_games(self):
        once = BradleyTerry(tol=1e-12).fit(self.games[1:], sample_weight=[2.0, 1.0, 1.0])
        twice = BradleyTerry(tol=1e-12).fit(self.games)
        np.testing.assert_allclose(once.strengths_, twice.strengths_, rtol=1e-12)

    def test_scikit_learns_conventions(self):
        """`check_estimator` feeds feature matrices; this takes pairs of names: its contract is checked here."""
        model = BradleyTerry(prior=None, method=0.5, tol=1e-4, max_sweeps=7)
        assert clone(model).get_params() == model.get_params()
        with pytest.raises(NotFittedError):
            model.predict_proba(self.games)
        assert model.set_params(method="zermelo").method == "zermelo"
        with pytest.raises(ValueError, match="prior"):
            BradleyTerry(prior="flat").fit(self.games)
        before = vars(model).copy()
        with pytest.raises(ValueError, match="pairs"):
            model.fit([["ann", "ann"]])
        assert vars(model) == before
        import pickle

        fitted = BradleyTerry().fit(self.games)
        np.testing.assert_array_equal(
            pickle.loads(pickle.dumps(fitted)).predict_proba(self.games), fitted.predict_proba(self.games)
        )

    def test_unknown_players_are_refused(self):
        model = BradleyTerry().fit(self.games)
        with pytest.raises(ValueError, match="dan"):
            model.predict_proba([["ann", "dan"]])
        with pytest.raises(ValueError, match="pairs"):
            model.predict_proba([[0, 1]])


class TestSummary:
    @given(st.integers(0, 2**32 - 1), st.booleans(), st.booleans())
    def test_any_chunks_and_any_tree_give_the_fit_to_all_games(self, in_a_tree, seed, named, weighted):
        rng = np.random.default_rng(seed)
        first = rng.integers(0, 6, 30)
        pairs = np.stack([first, (first + rng.integers(1, 6, 30)) % 6], axis=1)
        if named:
            pairs = np.array(["ann", "bo", "cem", "dee", "evelyn", "f"])[pairs]
        weights = rng.integers(0, 4, 30).astype(float) if weighted else None
        model = BradleyTerry(method=0.5, tol=1e-9)
        summary = BradleyTerrySummary(model)
        chunks = [
            (pairs[c, 0], pairs[c, 1]) if weights is None else (pairs[c, 0], pairs[c, 1], weights[c])
            for c in cuts(30, seed)
        ]
        got, want = summary.finish(in_a_tree(summary, chunks, seed)), clone(model).fit(pairs, sample_weight=weights)
        np.testing.assert_array_equal(got.classes_, want.classes_)
        np.testing.assert_array_equal(got.strengths_, want.strengths_)  # to the last bit
        assert got.result_.log_likelihood == want.result_.log_likelihood
        assert got is not model and not hasattr(model, "strengths_")

    @given(st.integers(0, 2**32 - 1), st.sampled_from([np.asarray, sp.csr_array, sp.coo_array]))
    def test_tables_of_wins(self, in_a_tree, seed, kind):
        rng = np.random.default_rng(seed)
        tables = rng.poisson(1.0, (4, 5, 5)) * (1 - np.eye(5))
        summary = BradleyTerrySummary(BradleyTerry(prior="logistic"), n=5)
        got = summary.finish(in_a_tree(summary, [kind(t) for t in tables], seed))
        want = bradley_terry(tables.sum(axis=0), prior="logistic")
        np.testing.assert_array_equal(got.strengths_, want.strengths)
        assert got.classes_.tolist() == [0, 1, 2, 3, 4]

    def test_fractions_to_rounding(self, in_a_tree):
        weights = np.random.default_rng(0).random(4)
        chunks = [(PAIRS[c, 0], PAIRS[c, 1], weights[c]) for c in cuts(4, 0)]
        got = SUMMARY.finish(in_a_tree(SUMMARY, chunks, 0))
        want = BradleyTerry().fit(PAIRS, sample_weight=weights)
        np.testing.assert_allclose(got.strengths_, want.strengths_, rtol=1e-12)

    def test_players_who_did_not_play(self):
        summary = BradleyTerrySummary(n=5)
        got = summary.finish(summary.update(summary.init(), (PAIRS[:, 0], PAIRS[:, 1])))
        want = bradley_terry(win_matrix(PAIRS[:, 0], PAIRS[:, 1], n=5), prior="logistic")
        np.testing.assert_array_equal(got.strengths_, want.strengths)
        with pytest.raises(ValueError, match="chunk must number players from 0 to n - 1 = 4"):
            summary.update(summary.init(), ([5], [1]))
        with pytest.raises(ValueError, match="chunk must number players from 0"):
            summary.update(summary.init(), ([-1], [1]))
        with pytest.raises(ValueError, match="state must be a state of n = 5 players"):
            summary.finish(LEAGUE)

    def test_games_of_any_kind_of_array(self, xp_array):
        got = SUMMARY.update(SUMMARY.init(), (xp_array(PAIRS[:, 0].copy()), xp_array(PAIRS[:, 1].copy())))
        for key, value in LEAGUE.items():
            np.testing.assert_array_equal(got[key], value)
        table = SUMMARY.update(SUMMARY.init(), xp_array(WINS))
        np.testing.assert_array_equal(table["wins"], WINS[WINS > 0])

    @pytest.mark.parametrize(
        "chunk", [[[0, 1]], "ann", np.ones((2, 3)), np.eye(3), ([0], [0]), ([0], [1, 2]), ([0], ["bob"]),
                  ([0.5], [1]), ([0], [1], [-1.0]), ([0], [1], [np.nan]), ([0],), ([[0]], [[1]]),
                  (np.array([2**63], np.uint64), np.array([1], np.uint64)), (["ann"], ["bob"])]
    )  # fmt: skip
    def test_a_bad_chunk_is_named(self, chunk):
        with pytest.raises((TypeError, ValueError), match="chunk"):
            SUMMARY.update(LEAGUE, chunk)

    def test_refused(self):
        with pytest.raises(ValueError, match="state must cover at least one game"):
            SUMMARY.finish(SUMMARY.init())
        with pytest.raises(ValueError, match="prior"):
            BradleyTerrySummary(BradleyTerry(prior="flat"))
        strict = BradleyTerrySummary(BradleyTerry(prior=None))
        with pytest.raises(ValueError, match="finite maximum"):
            strict.finish(strict.update(strict.init(), ([0], [1])))
