"""Bradley-Terry strengths by Newman's iteration, with Zermelo's and the family between; prior, ties, Plackett-Luce.

Reference: M. E. J. Newman, *Efficient computation of rankings from pairwise comparisons*, JMLR 24(238):1-25, 2023.
Chapter: notebooks/optimization/bradley_terry.ipynb.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.sparse as sp
from numba import njit, prange
from scipy.sparse.csgraph import connected_components
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from algokit.arrays import Array, from_numpy, is_array, kind_of, to_numpy
from algokit.checks import (
    AlgokitWarning,
    check_allocation,
    check_array,
    check_bool,
    check_float,
    check_int,
    check_one_of,
    check_same_length,
    check_sparse,
    check_state,
)

__all__ = [
    "BradleyTerry",
    "BradleyTerryResult",
    "BradleyTerrySummary",
    "bradley_terry",
    "log_likelihood",
    "plackett_luce",
    "strongly_connected_core",
    "win_matrix",
]

Method = Literal["newman", "zermelo"] | float
Updates = Literal["sequential", "simultaneous"]
_REASSOCIATE = {"reassoc", "contract", "arcp"}  # sums of non-negative terms: any order is as accurate as any other


class BradleyTerryResult(NamedTuple):
    """Fitted strengths.

    Attributes
    ----------
    strengths : array, shape (n,)
        :math:`\\pi_i > 0`. Without a prior their geometric mean is 1, so that :math:`\\pi/(1+\\pi)` is the chance
        against an average player.
    log_strengths : array, shape (n,)
        :math:`\\lambda_i = \\log \\pi_i`; differences are log-odds.
    n_sweeps : int
        Passes over all players.
    converged : bool
        Whether the tolerance was reached.
    log_likelihood : float
        Log-likelihood of the games alone (the prior is not in it).
    history : numpy.ndarray, shape (n_sweeps,)
        Root mean square change of :math:`\\pi/(1+\\pi)` in each sweep.
    tie_parameter : float or None
        Davidson's :math:`\\nu`, when ties were given.
    """

    strengths: Array
    log_strengths: Array
    n_sweeps: int
    converged: bool
    log_likelihood: float
    history: np.ndarray
    tie_parameter: float | None = None


def bradley_terry(
    wins: Any,
    *,
    ties: Any = None,
    prior: Literal["logistic"] | None = None,
    method: Method = "newman",
    updates: Updates | None = None,
    tol: float = 1e-6,
    max_sweeps: int = 10_000,
    init: Any = None,
    check: bool = True,
) -> BradleyTerryResult:
    r"""Maximum-likelihood (or MAP) strengths from who beat whom.

    Under :math:`P(i\text{ beats }j) = \pi_i/(\pi_i+\pi_j)` every stationary point of the likelihood is a fixed point of

    .. math:: \pi_i \leftarrow
        \frac{\sum_j w_{ij}\,(\alpha\pi_i+\pi_j)/(\pi_i+\pi_j)}{\sum_j(\alpha w_{ij}+w_{ji})/(\pi_i+\pi_j)},

    for any :math:`\alpha`: 1 is Zermelo's iteration of 1929, 0 is Newman's, the fastest.

    Parameters
    ----------
    wins : array or sparse array, shape (n, n)
        ``wins[i, j]``: how often player i beat player j; fractions are welcome, the diagonal is zero. NumPy, SciPy
        sparse, CuPy (dense or sparse), or a dense array of another kind.
    ties : array or sparse array, shape (n, n), optional
        Symmetric: how often i and j tied. Switches to Davidson's model, in which
        :math:`P(\text{tie}) \propto 2\nu\sqrt{\pi_i\pi_j}`.
    prior : {None, "logistic"}, default None
        ``"logistic"`` puts a standard logistic prior on each log-strength (one pretended win and one pretended loss
        against a player of strength 1): the answer is then always finite.
    method : {"newman", "zermelo"} or float, default "newman"
        The iteration; a number in [0, 1] is :math:`\alpha`.
    updates : {"sequential", "simultaneous"}, optional
        ``"sequential"`` uses new values at once, player by player (one thread); ``"simultaneous"`` moves all players
        together, halfway in log-strength so that it cannot oscillate (all threads, or the GPU). By default sequential
        on the CPU and simultaneous for CuPy arrays.
    tol : float, default 1e-6
        Stop when the root mean square change of :math:`\pi/(1+\pi)` over a sweep is below this.
    max_sweeps : int, default 10_000
        Give up after so many, with a warning.
    init : array, shape (n,), optional
        Positive strengths to start from, such as yesterday's; all ones by default.
    check : bool, default True
        Whether to test that a finite maximum exists. Switch it off only for leagues known to be connected.

    Returns
    -------
    BradleyTerryResult
        Strengths are of the kind of ``wins``.

    Raises
    ------
    TypeError
        If an argument is of the wrong type.
    ValueError
        If counts are negative or not finite, the matrix is not square, its diagonal is not zero, ``ties`` is not
        symmetric, or no finite maximum exists (then the message lists the components).

    Warns
    -----
    AlgokitWarning
        If ``max_sweeps`` was reached.

    Notes
    -----
    Time per sweep is proportional to the number of pairs that met. Source: equations of [1]_, section 2 to 5.

    .. [1] M. E. J. Newman, Efficient computation of rankings from pairwise comparisons, JMLR 24(238):1-25, 2023.

    Examples
    --------
    >>> import numpy as np
    >>> result = bradley_terry(np.array([[0, 3], [1, 0]]))
    >>> result.strengths.round(3), result.n_sweeps
    (array([1.732, 0.577]), 2)
    """
    games, like = _games(wins, ties)
    rule = _rule(method, prior, tol, max_sweeps)
    check_one_of(updates, "updates", (None, "sequential", "simultaneous"))
    start = _start(init, games.n)
    on_gpu = kind_of(like) == "cupy"
    if on_gpu and updates == "sequential":
        raise ValueError("updates must be 'simultaneous' for CuPy arrays: sequential updates cannot use a GPU")
    together = on_gpu or updates == "simultaneous"
    if together and ties is not None:
        raise ValueError("updates must be 'sequential', and wins on the host, when ties are given")
    if check_bool(check, "check") and prior is None:
        _check_connected(_edges(games), "wins")
    if together:
        log_strengths, history = (_simultaneous_gpu if on_gpu else _simultaneous_cpu)(games, start, rule)
    elif ties is None:
        log_strengths, history = _sequential(games, start, rule)
    else:
        log_strengths, history, nu = _sequential_ties(games, start, rule)
        value = _log_likelihood_ties(games, log_strengths, nu)
        return _result(log_strengths, history, rule, value, like, nu)
    return _result(log_strengths, history, rule, _log_likelihood(games, log_strengths), like)


def plackett_luce(
    rankings: Sequence[Sequence[int]],
    *,
    n: int | None = None,
    prior: Literal["logistic"] | None = None,
    method: Method = "newman",
    tol: float = 1e-6,
    max_sweeps: int = 10_000,
    init: Any = None,
    check: bool = True,
) -> BradleyTerryResult:
    r"""Strengths from rankings of several players at a time, by the same rearrangement of the likelihood equation.

    A ranking is a sequence of choices: at each stage player i is chosen among those left with probability
    :math:`\pi_i/S`, :math:`S` being the sum of the strengths left.

    Parameters
    ----------
    rankings : sequence of sequences of int
        Each lists players, best first; it may leave players out, and must hold at least two, none twice.
    n : int, optional
        Number of players; by default one more than the largest index.
    prior : {None, "logistic"}, default None
        As in :func:`bradley_terry`.
    method : {"newman", "zermelo"} or float, default "newman"
        As in :func:`bradley_terry`; ``"zermelo"`` is Hunter's MM algorithm.
    tol : float, default 1e-6
        As in :func:`bradley_terry`.
    max_sweeps : int, default 10_000
        As in :func:`bradley_terry`.
    init : array, shape (n,), optional
        As in :func:`bradley_terry`.
    check : bool, default True
        As in :func:`bradley_terry`.

    Returns
    -------
    BradleyTerryResult
        Strengths of shape (n,), NumPy.

    Raises
    ------
    TypeError
        If ``rankings`` is not a sequence of sequences of integers.
    ValueError
        If a ranking is malformed, or no finite maximum exists.

    Warns
    -----
    AlgokitWarning
        If ``max_sweeps`` was reached.

    Notes
    -----
    Rankings of two are games: the answer is then that of :func:`bradley_terry`. Source: Newman (2023), section 6.

    Examples
    --------
    >>> plackett_luce([[0, 1, 2], [1, 0, 2], [2, 0, 1]]).strengths.round(3)
    array([1.806, 1.076, 0.515])
    """
    ballots = _ballots(rankings, n)
    rule = _rule(method, prior, tol, max_sweeps)
    pi = _start(init, ballots.n).copy()
    if check_bool(check, "check") and prior is None:
        follows = np.setdiff1d(np.arange(1, len(ballots.items)), ballots.offsets)  # places that are not a first one
        above, below = ballots.items[follows - 1], ballots.items[follows]
        _check_connected(sp.csr_array((np.ones(len(follows)), (above, below)), shape=(ballots.n,) * 2), "rankings")
    history = np.empty(rule.max_sweeps)
    count = _sweeps_rankings(ballots, pi, rule, history)
    return _result(np.log(pi), history[:count], rule, _log_likelihood_rankings(ballots, pi), None)


def win_matrix(winners: Any, losers: Any, *, n: int | None = None, weights: Any = None) -> sp.csr_array:
    """Table of wins from a list of games.

    Parameters
    ----------
    winners, losers : array-like of int, shape (m,)
        Who won and who lost each game; players are numbered from 0.
    n : int, optional
        Number of players; by default one more than the largest index.
    weights : array-like, shape (m,), optional
        Non-negative weight of each game; 1 by default.

    Returns
    -------
    scipy.sparse.csr_array, shape (n, n)
        ``W[i, j]``: total weight of the games in which i beat j.

    Raises
    ------
    TypeError
        If an argument is not numeric.
    ValueError
        If lengths differ, an index is out of range, or a player plays against itself.

    Examples
    --------
    >>> win_matrix([0, 0, 1], [1, 1, 0]).toarray()
    array([[0., 2.],
           [1., 0.]])
    """
    winners = to_numpy(check_array(winners, "winners", ndim=1, dtype="integer", low=0))
    losers = to_numpy(check_array(losers, "losers", ndim=1, dtype="integer", low=0))
    check_same_length(winners=winners, losers=losers)
    if (winners == losers).any():
        raise ValueError(f"winners and losers must differ, got the same player in game {np.argmax(winners == losers)}")
    largest = int(max(winners.max(), losers.max()))
    n = _number_of_players(largest, n, "winners" if winners.max() >= losers.max() else "losers")
    if weights is None:
        weights = np.ones(len(winners))
    else:
        weights = to_numpy(check_array(weights, "weights", ndim=1, low=0))
        check_same_length(winners=winners, weights=weights)
    return sp.csr_array(sp.coo_array((weights, (winners, losers)), shape=(n, n)))


def log_likelihood(wins: Any, log_strengths: Any) -> float:
    r"""Log-likelihood :math:`\sum_{ij} w_{ij}\log\frac{\pi_i}{\pi_i+\pi_j}` of a table of wins.

    Parameters
    ----------
    wins : array or sparse array, shape (n, n)
        As in :func:`bradley_terry`.
    log_strengths : array, shape (n,)
        :math:`\log\pi`.

    Returns
    -------
    float
        In nats; no overflow however large the strengths.

    Raises
    ------
    TypeError
        If an argument is not numeric.
    ValueError
        If a shape is wrong, a count negative, or a value not finite.

    Examples
    --------
    >>> round(log_likelihood([[0, 1], [1, 0]], [0.0, 0.0]), 6)
    -1.386294
    """
    games, _ = _games(wins, None)
    log_strengths = to_numpy(check_array(log_strengths, "log_strengths", shape=(games.n,))).astype(np.float64)
    return _log_likelihood(games, log_strengths)


def strongly_connected_core(wins: Any) -> np.ndarray:
    """The largest set of players in which everyone beats everyone else along some chain of wins.

    Within it the maximum-likelihood strengths are finite and unique; across such sets they are not.

    Parameters
    ----------
    wins : array or sparse array, shape (n, n)
        As in :func:`bradley_terry`.

    Returns
    -------
    numpy.ndarray of int, shape (m,)
        Indices of its players, ascending.

    Raises
    ------
    TypeError
        If ``wins`` is not numeric.
    ValueError
        If ``wins`` is not a table of wins.

    Examples
    --------
    >>> strongly_connected_core([[0, 1, 1], [1, 0, 0], [0, 0, 0]])
    array([0, 1])
    """
    games, _ = _games(wins, None)
    _, label = connected_components(_edges(games), directed=True, connection="strong")
    return np.flatnonzero(label == np.bincount(label).argmax())


class BradleyTerry(BaseEstimator):
    """Bradley-Terry model of named players, with scikit-learn's interface.

    Parameters
    ----------
    prior : {None, "logistic"}, default "logistic"
        As in :func:`bradley_terry`; with the prior every league can be fitted.
    method : {"newman", "zermelo"} or float, default "newman"
        As in :func:`bradley_terry`.
    tol : float, default 1e-6
        As in :func:`bradley_terry`.
    max_sweeps : int, default 10_000
        As in :func:`bradley_terry`.

    Attributes
    ----------
    classes_ : numpy.ndarray, shape (n,)
        The players, sorted.
    strengths_ : numpy.ndarray, shape (n,)
        Their strengths.
    result_ : BradleyTerryResult
        Everything else about the fit.

    Examples
    --------
    >>> games = [["ann", "bob"], ["ann", "bob"], ["bob", "cem"], ["cem", "ann"]]
    >>> model = BradleyTerry().fit(games)
    >>> model.predict_proba([["ann", "cem"]]).round(2)
    array([[0.57, 0.43]])
    """

    def __init__(
        self,
        *,
        prior: Literal["logistic"] | None = "logistic",
        method: Method = "newman",
        tol: float = 1e-6,
        max_sweeps: int = 10_000,
    ) -> None:
        self.prior = prior
        self.method = method
        self.tol = tol
        self.max_sweeps = max_sweeps

    def fit(self, pairs: Any, y: Any = None, sample_weight: Any = None) -> BradleyTerry:
        """Fit strengths to games.

        Parameters
        ----------
        pairs : array-like, shape (m, 2)
            One game a row: the winner's name, then the loser's; names are strings or integers.
        y : None
            Ignored.
        sample_weight : array-like, shape (m,), optional
            Non-negative weight of each game.

        Returns
        -------
        BradleyTerry
            Self.

        Raises
        ------
        TypeError
            If names are not strings or integers.
        ValueError
            If ``pairs`` is malformed, a player plays against itself, or a parameter is out of range.
        """
        pairs = _pairs(pairs)
        players, index = np.unique(pairs, return_inverse=True)
        index = index.reshape(pairs.shape)
        if (index[:, 0] == index[:, 1]).any():
            raise ValueError(f"pairs must name two players each, got {pairs[np.argmax(index[:, 0] == index[:, 1])]}")
        if sample_weight is not None:
            sample_weight = check_array(sample_weight, "sample_weight", ndim=1, low=0)
            check_same_length(pairs=pairs, sample_weight=sample_weight)
        return self._fit_table(players, win_matrix(index[:, 0], index[:, 1], n=len(players), weights=sample_weight))

    def _fit_table(self, players: np.ndarray, wins: sp.csr_array) -> BradleyTerry:
        self.result_ = bradley_terry(
            wins, prior=self.prior, method=self.method, tol=self.tol, max_sweeps=self.max_sweeps
        )
        self.classes_ = players
        self.strengths_ = self.result_.strengths
        return self

    def predict_proba(self, pairs: Any) -> np.ndarray:
        """Chances of the first and of the second player in games to come.

        Parameters
        ----------
        pairs : array-like, shape (m, 2)
            Two players' names a row, all seen in ``fit``.

        Returns
        -------
        numpy.ndarray, shape (m, 2)
            Probabilities; each row sums to 1.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        TypeError
            If names are not strings or integers.
        ValueError
            If ``pairs`` is malformed or names an unknown player.
        """
        check_is_fitted(self)
        pairs = _pairs(pairs)
        if pairs.dtype.kind != self.classes_.dtype.kind:
            raise ValueError(f"pairs must name players as fit did ({self.classes_.dtype}), got dtype {pairs.dtype}")
        place = np.searchsorted(self.classes_, pairs).clip(max=len(self.classes_) - 1)
        known = self.classes_[place] == pairs
        if not known.all():
            raise ValueError(f"pairs must name players seen in fit, got {pairs[~known][0]!r}")
        first, second = self.strengths_[place].T
        return np.stack([first, second], axis=1) / (first + second)[:, None]


class BradleyTerrySummary:
    """Win counts of games that lie in chunks, on one machine or on many, and the fit to all of them.

    Counts add: whatever the chunks and the tree of merges, the fit is that of all games at once. To the last bit where
    games are counted (whole numbers up to 2^53 add exactly), to rounding where weights are fractions.

    Parameters
    ----------
    model : BradleyTerry, optional
        Parameters of the fit; ``BradleyTerry()`` by default.
    n : int, optional
        Players are numbered from 0 and these take part, whether they played or not. By default those who played do.

    Raises
    ------
    TypeError
        If ``model`` is not a BradleyTerry, or ``n`` no integer.
    ValueError
        If a parameter of ``model`` is out of range, or ``n`` less than 1.

    Notes
    -----
    A chunk is a tuple of arrays, winners and losers, both of shape (m,), and optionally weights of shape (m,); players
    are names or integers, of one sort in all chunks. Or it is a table of wins, shape (p, p), dense or sparse, with
    players 0 to p - 1. The state holds the players and one count for each ordered pair in which the first has won.

    Examples
    --------
    >>> import numpy as np
    >>> summary = BradleyTerrySummary()
    >>> a = summary.update(summary.init(), (np.array(["ann", "ann"]), np.array(["bob", "bob"])))
    >>> b = summary.update(summary.init(), (np.array(["bob", "cem"]), np.array(["cem", "ann"])))
    >>> model = summary.finish(summary.merge(a, b))
    >>> model.predict_proba([["ann", "cem"]]).round(2)
    array([[0.57, 0.43]])
    """

    _KEYS = ("losers", "players", "winners", "wins")

    def __init__(self, model: BradleyTerry | None = None, *, n: int | None = None) -> None:
        if model is not None and not isinstance(model, BradleyTerry):
            raise TypeError(f"model must be a BradleyTerry, got {type(model).__name__}")
        self.model = BradleyTerry() if model is None else model
        _rule(self.model.method, self.model.prior, self.model.tol, self.model.max_sweeps)
        self.n = None if n is None else check_int(n, "n", low=1)
        check_allocation((self.n or 1,), "n")

    def init(self) -> dict[str, np.ndarray]:
        """State of no games.

        Returns
        -------
        dict of str to numpy.ndarray
            ``players`` (p,), sorted; ``winners`` and ``losers`` (m,), indices into them; ``wins`` (m,).
        """
        nobody = np.zeros(0, np.int64)
        return self._state(np.arange(self.n or 0), nobody, nobody, np.zeros(0))

    def update(
        self, state: dict[str, np.ndarray], chunk: Any, rng: np.random.Generator | None = None
    ) -> dict[str, np.ndarray]:
        """State after one more chunk of games.

        Parameters
        ----------
        state : dict of str to numpy.ndarray
            A state.
        chunk : tuple of arrays, or array or sparse array, shape (p, p)
            Winners, losers and perhaps weights (there may be no games); or a table of wins, as
            :func:`bradley_terry` takes it.
        rng : numpy.random.Generator, optional
            Ignored: nothing is random.

        Returns
        -------
        dict of str to numpy.ndarray
            Players, and wins by pairs of their indices.

        Raises
        ------
        TypeError, ValueError
            If ``state`` is not a state of this summary, a player of ``chunk`` plays against itself, is not below
            ``n``, or is of another sort than before (a name or a number), or weights are negative or not finite.
        """
        self._checked(state, "state")
        return self._merged(state, self._table(chunk) if not isinstance(chunk, tuple) else self._list(chunk), "chunk")

    def merge(self, a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """State of the games of both.

        Parameters
        ----------
        a, b : dict of str to numpy.ndarray
            States.

        Returns
        -------
        dict of str to numpy.ndarray
            The state of all their games.

        Raises
        ------
        TypeError, ValueError
            If they are not states of this summary, or name players where the other numbers them.
        """
        self._checked(a, "a")
        self._checked(b, "b")
        return self._merged(a, b, "b")

    def finish(self, state: dict[str, np.ndarray]) -> BradleyTerry:
        """The model, fitted to all games.

        Parameters
        ----------
        state : dict of str to numpy.ndarray
            A state of at least one game.

        Returns
        -------
        BradleyTerry
            A new one, what its ``fit`` makes of the games.

        Raises
        ------
        TypeError, ValueError
            If it is not a state of this summary, covers no game, or its games have no finite maximum.

        Warns
        -----
        AlgokitWarning
            If ``max_sweeps`` was reached.
        """
        self._checked(state, "state")
        if not state["wins"].any():
            raise ValueError("state must cover at least one game, got none")
        players, pairs = state["players"].copy(), (state["winners"], state["losers"])
        wins = sp.csr_array(sp.coo_array((state["wins"], pairs), shape=(len(players),) * 2))
        return BradleyTerry(**self.model.get_params())._fit_table(players, wins)

    def _list(self, chunk: tuple[Any, ...]) -> dict[str, np.ndarray]:
        """Counts of a list of games."""
        if len(chunk) not in (2, 3):
            raise TypeError(f"chunk must hold winners, losers and perhaps weights, got {len(chunk)} arrays")
        columns = [to_numpy(c) if is_array(c) else np.asarray(c) for c in chunk]
        if len({c.shape for c in columns}) > 1 or columns[0].ndim != 1:
            raise ValueError(f"chunk must hold arrays of one length, got shapes {[c.shape for c in columns]}")
        if not len(columns[0]):
            return self.init()
        if len({c.dtype.kind in "OU" for c in columns[:2]}) > 1:
            raise TypeError(f"chunk must name or number players, not both, got {[str(c.dtype) for c in columns[:2]]}")
        try:
            pairs = _pairs(np.stack(columns[:2], axis=1))
        except (TypeError, ValueError) as error:
            raise type(error)(f"chunk must hold winners and losers: {error}") from None
        if (pairs[:, 0] == pairs[:, 1]).any():
            raise ValueError(f"chunk must name two players a game, got {pairs[np.argmax(pairs[:, 0] == pairs[:, 1])]}")
        if pairs.dtype.kind in "iu":
            if (pairs > np.iinfo(np.int64).max).any():
                raise ValueError(f"chunk must number players within 64 bits, got {pairs.max()}")
            pairs = pairs.astype(np.int64)
        weights = np.ones(len(pairs))
        if len(columns) == 3:
            weights = check_array(columns[2], "chunk[2]", ndim=1, low=0).astype(np.float64)
        players, index = np.unique(pairs, return_inverse=True)
        first, second = index.reshape(pairs.shape).T
        return self._state(players, first, second, weights)

    def _table(self, chunk: Any) -> dict[str, np.ndarray]:
        """Counts of a table of wins."""
        if not (sp.issparse(chunk) or is_array(chunk) or type(chunk).__module__.startswith("cupyx")):
            raise TypeError(f"chunk must be a tuple of arrays or a table of wins, got {type(chunk).__name__}")
        wins = sp.coo_array(_table(chunk, "chunk")[0])
        return self._state(np.arange(wins.shape[0]), wins.coords[0], wins.coords[1], wins.data)

    def _merged(self, a: dict[str, np.ndarray], b: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
        if not len(a["players"]) or not len(b["players"]):
            return dict(a if len(a["players"]) else b)
        if a["players"].dtype.kind != b["players"].dtype.kind:
            raise ValueError(f"{name} must name players, or number them, as before")
        players = np.union1d(a["players"], b["players"])
        if self.n is not None and (players.dtype.kind == "U" or players[0] < 0 or players[-1] >= self.n):
            raise ValueError(f"{name} must number players from 0 to n - 1 = {self.n - 1}")
        place = [np.searchsorted(players, s["players"]) for s in (a, b)]
        winners, losers = (
            np.concatenate([p[s[side]] for p, s in zip(place, (a, b), strict=True)]) for side in ("winners", "losers")
        )
        return self._state(players, winners, losers, np.concatenate([a["wins"], b["wins"]]))

    def _state(
        self, players: np.ndarray, winners: np.ndarray, losers: np.ndarray, wins: np.ndarray
    ) -> dict[str, np.ndarray]:
        """One entry a pair, in the order of winners and losers."""
        pair, index = np.unique(winners.astype(np.int64) * len(players) + losers, return_inverse=True)
        count = np.bincount(index.reshape(-1), weights=wins, minlength=len(pair))
        first, second = np.divmod(pair, max(1, len(players)))
        return {"players": players, "winners": first, "losers": second, "wins": count}

    def _checked(self, state: Any, name: str) -> None:
        check_state(state, name, self._KEYS)
        if self.n is not None and len(state["players"]) != self.n:
            raise ValueError(f"{name} must be a state of n = {self.n} players, got {len(state['players'])}")


# --- from arguments to arrays -----------------------------------------------------------------------------------------


class _Games(NamedTuple):
    """All pairs that met, row by row and in both directions (CSR): what i won, lost and tied against each opponent."""

    n: int
    indptr: np.ndarray  # (n + 1,)
    indices: np.ndarray  # (m,) opponents
    won: np.ndarray  # (m,)
    lost: np.ndarray  # (m,)
    tied: np.ndarray  # (m,), empty where the model has no ties


class _Ballots(NamedTuple):
    """All rankings end to end."""

    n: int
    items: np.ndarray  # (places,) players
    offsets: np.ndarray  # (rankings + 1,) where each ranking begins
    where: np.ndarray  # (places,) the places of player 0, then those of player 1, ...
    by_player: np.ndarray  # (n + 1,) bounds in `where`


class _Rule(NamedTuple):
    """How to iterate and when to stop."""

    alpha: float
    prior: float  # weight of the prior: 0 or 1
    tol: float
    max_sweeps: int


def _rule(method: Method, prior: str | None, tol: float, max_sweeps: int) -> _Rule:
    if isinstance(method, str):
        alpha = {"newman": 0.0, "zermelo": 1.0}[check_one_of(method, "method", ("newman", "zermelo"))]
    else:
        alpha = check_float(method, "method", low=0, high=1)
    check_one_of(prior, "prior", (None, "logistic"))
    tol = check_float(tol, "tol", low=0, open_low=True)
    max_sweeps = check_int(max_sweeps, "max_sweeps", low=1)
    check_allocation((max_sweeps,), "max_sweeps")
    return _Rule(alpha, float(prior is not None), tol, max_sweeps)


def _games(wins: Any, ties: Any) -> tuple[_Games, Any]:
    """Checked games, and the array whose kind the answer takes."""
    table, like = _table(wins, "wins")
    n = table.shape[0]
    draws = sp.csr_array((n, n))
    if ties is not None:
        draws, _ = _table(ties, "ties")
        if draws.shape != table.shape:
            raise ValueError(f"ties must have the shape of wins, {table.shape}, got {draws.shape}")
        if (abs(draws - draws.T) > 1e-12 * (1 + draws.max())).nnz:
            raise ValueError("ties must be symmetric: ties[i, j] counts the ties of i and j")
        if draws.nnz and not table.nnz:
            raise ValueError("wins must hold a decisive game: with nothing but ties the tie parameter is infinite")
        table = sp.csr_array(table + draws / 2)  # half of each tie to either side: u = w + t/2
    back = sp.csr_array(table.T)
    back.sort_indices()
    indptr, indices, won, lost = _merge(table.indptr, table.indices, table.data, back.indptr, back.indices, back.data)
    tied = np.zeros(0)
    if ties is not None:
        tied = np.asarray(draws[np.repeat(np.arange(n), np.diff(indptr)), indices]).ravel()
    return _Games(n, indptr, indices, won, lost, tied), like


def _table(counts: Any, name: str) -> tuple[sp.csr_array, Any]:
    like = counts if is_array(counts) else None
    if type(counts).__module__.startswith("cupyx"):  # a sparse matrix on the GPU
        like, counts = counts.data, counts.get()
    elif like is not None:
        counts = to_numpy(counts)
    table = check_sparse(counts, name, square=True, low=0)
    diagonal = table.diagonal()
    if diagonal.any():
        i = int(diagonal.argmax())
        raise ValueError(
            f"{name} must have a zero diagonal (nobody plays alone), got {name}[{i}, {i}] = {diagonal[i]:g}"
        )
    return table, like


def _start(init: Any, n: int) -> np.ndarray:
    if init is None:
        return np.ones(n)
    return to_numpy(check_array(init, "init", shape=(n,), low=0, open_low=True)).astype(np.float64)


def _ballots(rankings: Any, n: int | None) -> _Ballots:
    if not isinstance(rankings, (list, tuple, np.ndarray)) or (isinstance(rankings, np.ndarray) and not rankings.ndim):
        raise TypeError(f"rankings must be a sequence of sequences of integers, got {type(rankings).__name__}")
    rows = [to_numpy(check_array(r, "rankings", ndim=1, dtype="integer", min_size=2, low=0)) for r in rankings]
    if not rows:
        raise ValueError("rankings must hold at least one ranking")
    for k, row in enumerate(rows):
        if len(np.unique(row)) != len(row):
            raise ValueError(f"rankings must not name a player twice, as ranking {k} does")
    items = np.concatenate(rows).astype(np.int64)
    n = _number_of_players(int(items.max()), n, "rankings")
    where = np.argsort(items, kind="stable")
    by_player = np.searchsorted(items[where], np.arange(n + 1))
    return _Ballots(n, items, np.cumsum([0, *map(len, rows)]), where, by_player)


def _number_of_players(largest: int, n: int | None, name: str) -> int:
    """``n`` as given, or one more than the largest index; never less, never more than memory holds."""
    if n is None:
        check_allocation((largest + 1,), name)
        return largest + 1
    n = check_int(n, "n", low=1)
    check_allocation((n,), "n")
    if largest >= n:
        raise ValueError(f"{name} must name players below n = {n}, got {largest}")
    return n


def _pairs(pairs: Any) -> np.ndarray:
    """Pairs of names as an array of strings or integers, shape (m, 2)."""
    try:
        table = np.asarray(pairs)
    except ValueError as error:
        raise ValueError(f"pairs must have shape (m, 2): {error}") from None
    if table.dtype.kind == "O" and all(isinstance(name, str) for name in table.flat):
        table = table.astype(str)
    if table.dtype.kind == "f" and table.size:
        table = to_numpy(check_array(table, "pairs", dtype="integer"))
    if table.dtype.kind not in "iuU":
        raise TypeError(f"pairs must hold strings or integers, got dtype {table.dtype}")
    if table.ndim != 2 or table.shape[1] != 2 or len(table) == 0:
        raise ValueError(f"pairs must have shape (m, 2) with m >= 1, got {table.shape}")
    return table


def _edges(games: _Games) -> sp.csr_array:
    """Graph with an edge from i to j where i beat j."""
    graph = sp.csr_array((games.won, games.indices, games.indptr), shape=(games.n, games.n), copy=True)
    graph.eliminate_zeros()
    return graph


def _check_connected(graph: sp.csr_array, name: str) -> None:
    count, label = connected_components(graph, directed=True, connection="strong")
    if count > 1:
        largest = np.bincount(label).argsort()[::-1][:4]
        shown = [np.flatnonzero(label == c) for c in largest]
        parts = ", ".join("{" + ", ".join(map(str, p[:6])) + (", ..." if len(p) > 6 else "") + "}" for p in shown)
        raise ValueError(
            f"{name} must link every player to every other by a chain of wins for a finite maximum to exist, but the "
            f"players fall into {count} components: {parts}{', ...' if count > 4 else ''}. "
            "Use prior='logistic', or rank strongly_connected_core(wins) alone"
        )


def _result(
    log_strengths: np.ndarray, history: np.ndarray, rule: _Rule, value: float, like: Any, nu: float | None = None
) -> BradleyTerryResult:
    converged = bool(history[-1] < rule.tol)
    if not converged:
        warnings.warn(
            f"no convergence in {len(history)} sweeps: the last one changed pi/(1+pi) by {history[-1]:.2g}",
            AlgokitWarning,
            stacklevel=3,
        )
    with np.errstate(over="ignore", under="ignore"):
        strengths = np.exp(log_strengths)
    strengths, log_strengths = from_numpy(strengths, like=like), from_numpy(log_strengths, like=like)
    return BradleyTerryResult(strengths, log_strengths, len(history), converged, float(value), history.copy(), nu)


@njit(cache=True, error_model="numpy")
def _merge(a_ptr, a_col, a, b_ptr, b_col, b):  # type: ignore[no-untyped-def]
    """Union of the patterns of two sorted CSR matrices: (indptr, indices, values of a, values of b)."""
    n = len(a_ptr) - 1
    room = len(a) + len(b)
    indptr = np.zeros(n + 1, np.int64)
    indices = np.empty(room, np.int32)
    left, right = np.zeros(room), np.zeros(room)
    m = 0
    for i in range(n):
        p, q = a_ptr[i], b_ptr[i]
        while p < a_ptr[i + 1] or q < b_ptr[i + 1]:
            ja = a_col[p] if p < a_ptr[i + 1] else n
            jb = b_col[q] if q < b_ptr[i + 1] else n
            j = min(ja, jb)
            indices[m] = j
            if ja == j:
                left[m] = a[p]
                p += 1
            if jb == j:
                right[m] = b[q]
                q += 1
            m += 1
        indptr[i + 1] = m
    return indptr, indices[:m].copy(), left[:m].copy(), right[:m].copy()


# --- the iteration ----------------------------------------------------------------------------------------------------

_TOO_WIDE = 1e200  # beyond this ratio to the average the sweeps go on in log-strengths


def _sequential(games: _Games, start: np.ndarray, rule: _Rule) -> tuple[np.ndarray, np.ndarray]:
    history, pi = np.empty(rule.max_sweeps), start.copy()
    count, wide = _sweeps(games, pi, rule, history)
    log_strengths = np.log(pi)
    if wide:
        count = _sweeps_log(games, log_strengths, rule, history, count)
    return log_strengths, history[:count]


@njit(cache=True, error_model="numpy", fastmath=_REASSOCIATE)
def _update(i: int, games: _Games, pi: np.ndarray, rule: _Rule) -> float:
    """New strength of player i: the chapter's eq. (6), with the prior's two games."""
    mine = pi[i]
    over = rule.prior * (rule.alpha * mine + 1.0) / (mine + 1.0)
    under = rule.prior * (rule.alpha + 1.0) / (mine + 1.0)
    for k in range(games.indptr[i], games.indptr[i + 1]):
        theirs = pi[games.indices[k]]
        r = 1.0 / (mine + theirs)
        over += games.won[k] * (rule.alpha * mine + theirs) * r
        under += (rule.alpha * games.won[k] + games.lost[k]) * r
    return over / under if over > 0.0 and under > 0.0 else mine  # nobody met: nothing to learn


@njit(cache=True, error_model="numpy")
def _centre(pi: np.ndarray) -> None:
    """Divide by the geometric mean; one logarithm for many players."""
    log_mean, product = 0.0, 1.0
    for i in range(len(pi)):
        product *= pi[i]
        if product > 1e50 or product < 1e-50:
            log_mean += np.log(product)
            product = 1.0
    scale = np.exp(-(log_mean + np.log(product)) / len(pi))
    for i in range(len(pi)):
        pi[i] *= scale


@njit(cache=True, error_model="numpy")
def _rescale(pi: np.ndarray, rule: _Rule) -> None:
    """Fix the common scale, which the games do not see.

    Without a prior: geometric mean 1. With it, the prior alone pulls the scale, a little in each sweep: give the scale
    an update of its own, Newman's for one more player (eq. (8) of the chapter).
    """
    if rule.prior == 0.0:
        _centre(pi)
    else:
        below = (1.0 / (1.0 + pi)).sum()
        pi *= below / (len(pi) - below)


@njit(cache=True, error_model="numpy")
def _moved(pi: np.ndarray, before: np.ndarray) -> float:
    """Root mean square change of pi / (1 + pi) since ``before``, which is brought up to date."""
    change = 0.0
    for i in range(len(pi)):
        now = pi[i] / (1.0 + pi[i])
        change += (now - before[i]) ** 2
        before[i] = now
    return np.sqrt(change / len(pi))


@njit(cache=True, error_model="numpy")
def _sweeps(games: _Games, pi: np.ndarray, rule: _Rule, history: np.ndarray) -> tuple[int, bool]:
    """Sequential sweeps in place; (number of sweeps, whether strengths became too wide for this form)."""
    before = pi / (1.0 + pi)
    for sweep in range(rule.max_sweeps):
        for i in range(games.n):
            pi[i] = _update(i, games, pi, rule)
        _rescale(pi, rule)
        history[sweep] = _moved(pi, before)
        if history[sweep] < rule.tol:
            return sweep + 1, False
        if pi.max() > _TOO_WIDE or pi.min() < 1.0 / _TOO_WIDE:
            return sweep + 1, True
    return rule.max_sweeps, False


@njit(cache=True, error_model="numpy")
def _sweeps_log(games: _Games, lam: np.ndarray, rule: _Rule, history: np.ndarray, done: int) -> int:
    """The same sweeps in log-strengths: nothing overflows, at two exponentials a pair."""
    before = 1.0 / (1.0 + np.exp(-lam))
    for sweep in range(done, rule.max_sweeps):
        for i in range(games.n):
            p, q = 1.0 / (1.0 + np.exp(-lam[i])), 1.0 / (1.0 + np.exp(lam[i]))  # against strength 1
            over = rule.prior * (rule.alpha * p + q)
            under = rule.prior * (rule.alpha + 1.0) * p
            for k in range(games.indptr[i], games.indptr[i + 1]):
                d = lam[i] - lam[games.indices[k]]
                p, q = 1.0 / (1.0 + np.exp(-d)), 1.0 / (1.0 + np.exp(d))
                over += games.won[k] * (rule.alpha * p + q)
                under += (rule.alpha * games.won[k] + games.lost[k]) * p
            if over > 0.0 and under > 0.0:
                lam[i] += np.log(over) - np.log(under)
        now = 1.0 / (1.0 + np.exp(-lam))
        lam -= lam.mean() if rule.prior == 0.0 else np.log(now.sum() / (1.0 - now).sum())
        now = 1.0 / (1.0 + np.exp(-lam))
        history[sweep] = np.sqrt(((now - before) ** 2).mean())
        before = now
        if history[sweep] < rule.tol:
            return sweep + 1
    return rule.max_sweeps


def _simultaneous_cpu(games: _Games, start: np.ndarray, rule: _Rule) -> tuple[np.ndarray, np.ndarray]:
    history, pi = np.empty(rule.max_sweeps), start.copy()
    count = _sweeps_simultaneous(games, pi, rule, history)
    return np.log(pi), history[:count]


@njit(cache=True, error_model="numpy", parallel=True)
def _sweeps_simultaneous(games: _Games, pi: np.ndarray, rule: _Rule, history: np.ndarray) -> int:
    """All players at once, halfway (the geometric mean of old and new): rows are independent, so threads are free."""
    before = pi / (1.0 + pi)
    new = np.empty(games.n)
    for sweep in range(rule.max_sweeps):
        for i in prange(games.n):
            new[i] = np.sqrt(pi[i] * _update(i, games, pi, rule))
        pi[:] = new
        _rescale(pi, rule)
        history[sweep] = _moved(pi, before)
        if history[sweep] < rule.tol:
            return sweep + 1
    return rule.max_sweeps


_HALF_STEP = r"""
extern "C" __global__ void half_step(const long long* indptr, const int* indices, const double* won,
    const double* lost, const double* pi, double* fresh, long long n, double alpha, double prior)
{   // one warp per player
    long long i = (blockIdx.x * (long long) blockDim.x + threadIdx.x) / 32;
    int lane = threadIdx.x % 32;
    if (i >= n) return;
    double mine = pi[i], over = 0.0, under = 0.0;
    for (long long k = indptr[i] + lane; k < indptr[i + 1]; k += 32) {
        double theirs = pi[indices[k]], r = 1.0 / (mine + theirs);
        over += won[k] * (alpha * mine + theirs) * r;
        under += (alpha * won[k] + lost[k]) * r;
    }
    for (int step = 16; step; step /= 2) {
        over += __shfl_down_sync(0xffffffff, over, step);
        under += __shfl_down_sync(0xffffffff, under, step);
    }
    if (lane == 0) {
        over += prior * (alpha * mine + 1.0) / (mine + 1.0);
        under += prior * (alpha + 1.0) / (mine + 1.0);
        fresh[i] = (over > 0.0 && under > 0.0) ? sqrt(mine * over / under) : mine;
    }
}
"""


def _simultaneous_gpu(games: _Games, start: np.ndarray, rule: _Rule) -> tuple[np.ndarray, np.ndarray]:
    """The simultaneous sweeps on the current CUDA device."""
    import cupy

    kernel = cupy.RawKernel(_HALF_STEP, "half_step")
    table = [cupy.asarray(a) for a in (games.indptr, games.indices, games.won, games.lost)]
    pi = cupy.asarray(start)
    new = cupy.empty_like(pi)
    blocks = ((games.n * 32 + 255) // 256,)
    history: list[float] = []
    while len(history) < rule.max_sweeps and not (history and history[-1] < rule.tol):
        kernel(blocks, (256,), (*table, pi, new, np.int64(games.n), np.float64(rule.alpha), np.float64(rule.prior)))
        if rule.prior == 0.0:
            new *= cupy.exp(-cupy.log(new).mean())
        else:
            below = (1.0 / (1.0 + new)).sum()
            new *= below / (games.n - below)
        change = new / (1.0 + new) - pi / (1.0 + pi)
        history.append(float(cupy.sqrt((change * change).mean())))
        pi, new = new, pi
    return np.log(pi.get()), np.array(history)


def _sequential_ties(games: _Games, start: np.ndarray, rule: _Rule) -> tuple[np.ndarray, np.ndarray, float]:
    history, pi = np.empty(rule.max_sweeps), start.copy()
    count, nu = _sweeps_ties(games, pi, float(games.tied.any()), rule, history)
    return np.log(pi), history[:count], float(nu)


@njit(cache=True, error_model="numpy")
def _sweeps_ties(games: _Games, pi: np.ndarray, nu: float, rule: _Rule, history: np.ndarray) -> tuple[int, float]:
    """Davidson's model; won and lost hold half of each tie (u = w + t/2), so their sum counts every game once."""
    before = pi / (1.0 + pi)
    for sweep in range(rule.max_sweeps):
        for i in range(games.n):
            mine = pi[i]
            over = rule.prior * (rule.alpha * mine + 1.0) / (mine + 1.0)
            under = rule.prior * (rule.alpha + 1.0) / (mine + 1.0)
            for k in range(games.indptr[i], games.indptr[i + 1]):
                theirs = pi[games.indices[k]]
                draw = nu * np.sqrt(mine * theirs)
                r = 1.0 / (mine + theirs + 2.0 * draw)
                over += games.won[k] * (rule.alpha * (mine + draw) + theirs + draw) * r
                under += (rule.alpha * games.won[k] + games.lost[k]) * (1.0 + draw / mine) * r
            if over > 0.0 and under > 0.0:
                pi[i] = over / under
        _rescale(pi, rule)
        expected = 0.0  # number of ties expected at nu, divided by nu; both directions, hence twice
        for i in range(games.n):
            for k in range(games.indptr[i], games.indptr[i + 1]):
                s = np.sqrt(pi[i] * pi[games.indices[k]])
                expected += (games.won[k] + games.lost[k]) * 2.0 * s / (pi[i] + pi[games.indices[k]] + 2.0 * nu * s)
        old, nu = nu, games.tied.sum() / expected
        history[sweep] = max(_moved(pi, before), abs(nu / (1.0 + nu) - old / (1.0 + old)))
        if history[sweep] < rule.tol:
            return sweep + 1, nu
    return rule.max_sweeps, nu


@njit(cache=True, error_model="numpy")
def _sweeps_rankings(ballots: _Ballots, pi: np.ndarray, rule: _Rule, history: np.ndarray) -> int:
    """Plackett-Luce; ``left[p]`` is the sum of the strengths from place p to the end of its ranking, kept current."""
    places = len(ballots.items)
    left, first = np.empty(places), np.empty(places, np.int64)
    last = np.zeros(places, np.bool_)
    for r in range(len(ballots.offsets) - 1):
        first[ballots.offsets[r] : ballots.offsets[r + 1]] = ballots.offsets[r]
        last[ballots.offsets[r + 1] - 1] = True
    before = pi / (1.0 + pi)
    for sweep in range(rule.max_sweeps):
        for p in range(places - 1, -1, -1):  # afresh in each sweep: no drift
            left[p] = pi[ballots.items[p]] + (0.0 if last[p] else left[p + 1])
        for i in range(ballots.n):
            mine = pi[i]
            over = rule.prior * (rule.alpha * mine + 1.0) / (mine + 1.0)
            under = rule.prior * (rule.alpha + 1.0) / (mine + 1.0)
            for q in range(ballots.by_player[i], ballots.by_player[i + 1]):
                p = ballots.where[q]
                for stage in range(first[p], p):  # present, another was chosen
                    under += 1.0 / left[stage]
                if not last[p]:  # chosen; to be left over at the end is no choice
                    over += (rule.alpha * mine + left[p + 1]) / left[p]
                    under += rule.alpha / left[p]
            if over > 0.0 and under > 0.0:
                pi[i] = over / under
                for q in range(ballots.by_player[i], ballots.by_player[i + 1]):
                    p = ballots.where[q]
                    for stage in range(p, first[p] - 1, -1):
                        left[stage] = pi[ballots.items[stage]] + (0.0 if last[stage] else left[stage + 1])
        _rescale(pi, rule)
        history[sweep] = _moved(pi, before)
        if history[sweep] < rule.tol:
            return sweep + 1
    return rule.max_sweeps


# --- likelihoods ------------------------------------------------------------------------------------------------------


def _log_likelihood(games: _Games, lam: np.ndarray) -> float:
    rows = np.repeat(np.arange(games.n, dtype=games.indices.dtype), np.diff(games.indptr))
    once = games.indices > rows  # each pair in one direction
    d = lam[rows[once]] - lam[games.indices[once]]
    won, lost = games.won[once], games.lost[once]
    softplus = np.log1p(np.exp(-np.abs(d)))  # NumPy's vectorised exponential beats a compiled loop
    return float((won * np.minimum(d, 0.0) - lost * np.maximum(d, 0.0) - (won + lost) * softplus).sum())


@njit(cache=True, error_model="numpy")
def _log_likelihood_ties(games: _Games, lam: np.ndarray, nu: float) -> float:
    total = 0.0
    for i in range(games.n):
        for k in range(games.indptr[i], games.indptr[i + 1]):
            if games.indices[k] > i:  # divide all weights by sqrt(pi_i pi_j): e^half, e^-half, 2 nu for a tie
                half = (lam[i] - lam[games.indices[k]]) / 2.0
                weights = 1.0 + np.exp(-2.0 * abs(half)) + 2.0 * nu * np.exp(-abs(half))
                total += (games.won[k] - games.lost[k]) * half
                total -= (games.won[k] + games.lost[k]) * (abs(half) + np.log(weights))
                if games.tied[k] > 0.0:
                    total += games.tied[k] * np.log(2.0 * nu)
    return total


@njit(cache=True, error_model="numpy")
def _log_likelihood_rankings(ballots: _Ballots, pi: np.ndarray) -> float:
    total = 0.0
    for r in range(len(ballots.offsets) - 1):
        left = pi[ballots.items[ballots.offsets[r + 1] - 1]]
        for p in range(ballots.offsets[r + 1] - 2, ballots.offsets[r] - 1, -1):
            left += pi[ballots.items[p]]
            total += np.log(pi[ballots.items[p]] / left)
    return total
