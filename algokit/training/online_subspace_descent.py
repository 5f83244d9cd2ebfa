"""AdamW in a low-rank subspace that follows the gradient by online PCA (Online Subspace Descent), for optax.

The same optimiser with another rule for the subspace is GaLore (a truncated SVD every ``gap`` steps), random or fixed
projection. The functions on single arrays need no JAX.

Reference: K. Liang, B. Liu, L. Chen and Q. Liu, *Memory-Efficient LLM Training with Online Subspace Descent*, NeurIPS
2024, arXiv:2408.12857. Chapter: notebooks/training/online_subspace_descent.ipynb.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from algokit._lazy import require
from algokit.arrays import Array, array_namespace, kind_of
from algokit.checks import RNGLike, check_array, check_bool, check_float, check_int, check_one_of

__all__ = [
    "OnlineSubspaceState",
    "PcaLoss",
    "adam_hamiltonian",
    "choose_side",
    "online_subspace_adamw",
    "pca_loss",
    "subspace_overlap",
]

Rate = float | Callable[[Any], Any]
UPDATES = ("online_pca", "svd", "random", "fixed")
INNER = ("adam", "momentum", "lion")
PROJ_OPTIMIZERS = ("adam", "sgd", "lion", "adafactor")
NOT_PROJECTED = ("embedding", "positions", "head")  # by default; the released code projects attention and MLP only


class PcaLoss(NamedTuple):
    """Online-PCA loss of a projection and its gradient.

    Attributes
    ----------
    value : float
        The loss, without units; in [0, 1] for orthonormal columns and a normalised gradient.
    grad : array, shape (n, k)
        Its gradient with respect to the projection.
    """

    value: float
    grad: Array


class OnlineSubspaceState(NamedTuple):
    """State of :func:`online_subspace_adamw`: a JAX pytree; dicts have the paths of the arrays as keys.

    Attributes
    ----------
    count : jax.Array, int32, shape ()
        Steps taken.
    P : dict of str to jax.Array, shape (min(n, m), rank)
        Projection of each projected matrix.
    subspace : optax state
        Of the inner optimiser: moments of shape (rank, max(n, m)) for each projected matrix.
    full : optax state
        Of Adam, for the arrays that are not projected.
    projection : dict of str to optax state
        Of the optimiser of each projection; empty unless ``update="online_pca"``.
    key : jax.Array
        Source of random frames.
    """

    count: Array
    P: dict[str, Array]
    subspace: Any
    full: Any
    projection: dict[str, Any]
    key: Array


class _Settings(NamedTuple):
    """Checked arguments of :func:`online_subspace_adamw`."""

    rank: int
    lr: Rate
    proj_lr: Rate
    update: str | Callable[..., Any]
    gap: int
    start: str
    scale: float
    weight_decay: float
    proj_weight_decay: float
    ortho: float
    retract: bool
    select: Callable[[str, Any], bool]


def online_subspace_adamw(
    *,
    rank: int,
    lr: Rate = 1e-3,
    proj_lr: Rate = 5e-3,
    update: Literal["online_pca", "svd", "random", "fixed"] | Callable[..., Any] = "online_pca",
    inner: Literal["adam", "momentum", "lion"] = "adam",
    proj_optimizer: Any = "adam",
    gap: int = 200,
    start: Literal["svd", "random"] = "svd",
    scale: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    proj_weight_decay: float = 0.0,
    ortho: float = 0.0,
    retract: bool = False,
    select: Callable[[str, Any], bool] | None = None,
    rng: RNGLike = 0,
) -> Any:
    r"""AdamW whose moments live in a learned rank-k subspace of each weight matrix: an optax optimiser.

    For a matrix of shape (n, m) with :math:`n < m` (else for its transpose), with gradient :math:`G` and projection
    :math:`P` of shape (n, k), a step is

    .. math:: W \leftarrow W - \eta\,s\,P\,\mathrm{Adam}(P^\top G) - \eta\lambda W,\qquad
        P \leftarrow P - \eta^P\bigl(\mathrm{Adam}(\nabla\ell(P)) + \lambda^P P\bigr),

    where :math:`\ell` is :func:`pca_loss`. State per matrix: :math:`2km + 3nk` numbers instead of Adam's :math:`2nm`.

    Parameters
    ----------
    rank : int
        k, at least 1. Matrices with min(n, m) <= k are not projected.
    lr, proj_lr : float or callable
        Learning rates of the weights and of the projections, or optax schedules (step -> rate). The released code
        multiplies ``proj_lr`` by the schedule of ``lr``.
    update : {"online_pca", "svd", "random", "fixed"} or callable, default "online_pca"
        How P moves: by one optimiser step on the PCA loss in every step (the paper); to the leading singular vectors of
        the gradient every ``gap`` steps (GaLore); to a random frame every ``gap`` steps; not at all; or to
        ``update(P, G, step, key)``, with G in the form (n, m), n <= m, and a JAX key.
    inner : {"adam", "momentum", "lion"}, default "adam"
        Optimiser in the subspace. Arrays that are not projected always get AdamW.
    proj_optimizer : {"adam", "sgd", "lion", "adafactor"} or optax.GradientTransformation, default "adam"
        Optimiser of P. A transformation gives the direction (like ``optax.scale_by_adam()``); ``proj_lr`` scales it.
    gap : int, default 200
        Steps between refreshes of "svd" and "random".
    start : {"svd", "random"}, default "svd"
        First P: leading singular vectors of the first gradient, or a random frame ("random" updates always start so).
    scale : float, default 1.0
        Factor s of the projected updates (0.25 in the released runs).
    betas : tuple of two floats, default (0.9, 0.999)
        Decay rates of the first and second moments.
    eps : float, default 1e-8
        Added to the root of the second moment.
    weight_decay, proj_weight_decay : float, default 0.0
        Decoupled decay of weights and projections.
    ortho : float, default 0.0
        Weight of :math:`\lVert P^\top P-I\rVert^2` in the PCA loss.
    retract : bool, default False
        Replace P by the nearest matrix with orthonormal columns after each PCA step.
    select : callable, optional
        ``select(path, array) -> bool``: whether to project, for paths such as ``blocks/0/query``. By default all
        matrices whose name is not ``embedding``, ``positions`` or ``head``.
    rng : None, int or numpy.random.Generator, default 0
        Source of random frames.

    Returns
    -------
    optax.GradientTransformation
        For any pytree of floating arrays (None and masked leaves are passed over). Its state is an
        :class:`OnlineSubspaceState`.

    Raises
    ------
    ModuleNotFoundError
        If optax is not there.
    TypeError, ValueError
        If an argument is of the wrong type or out of range. From ``update`` of the result: if the gradients do not have
        the paths and shapes of the state (with the path), or, outside of ``jit``, are not finite.

    Notes
    -----
    With zero gradient P stays as it is. When P starts at the singular vectors of the first gradient, that step does not
    move P: the PCA gradient is zero there, and Adam would turn its rounding errors into a full step. Computation is in
    float32 at least. ``lax.cond`` keeps the SVD out of other steps; under ``vmap`` it becomes a ``select``, which does
    not. Source: algorithm box of the paper; the released code for the sides and the first step.

    Examples
    --------
    >>> import jax, optax
    >>> loss = lambda params: ((params["weight"] - jax.numpy.eye(6, 4)) ** 2).sum() + (params["bias"] ** 2).sum()
    >>> params = {"weight": jax.numpy.zeros((6, 4)), "bias": jax.numpy.ones(4)}
    >>> optimizer = online_subspace_adamw(rank=2, lr=0.1)
    >>> state = optimizer.init(params)
    >>> {path: P.shape for path, P in state.P.items()}
    {'weight': (4, 2)}
    >>> updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    >>> bool(loss(optax.apply_updates(params, updates)) < loss(params))
    True
    """
    optax = require("optax", extra="neural")
    if not callable(update):
        check_one_of(update, "update", UPDATES)
    check_one_of(inner, "inner", INNER)
    if select is not None and not callable(select):
        raise TypeError(f"select must be callable, got {type(select).__name__}")
    b1, b2 = _check_betas(betas)
    eps = check_float(eps, "eps", low=0)
    settings = _Settings(
        rank=check_int(rank, "rank", low=1),
        lr=_check_rate(lr, "lr"),
        proj_lr=_check_rate(proj_lr, "proj_lr"),
        update=update,
        gap=check_int(gap, "gap", low=1, high=2**31 - 1),
        start=check_one_of(start, "start", ("svd", "random")),
        scale=check_float(scale, "scale", low=0),
        weight_decay=check_float(weight_decay, "weight_decay", low=0),
        proj_weight_decay=check_float(proj_weight_decay, "proj_weight_decay", low=0),
        ortho=check_float(ortho, "ortho", low=0),
        retract=check_bool(retract, "retract"),
        select=_default_select if select is None else select,
    )
    adam = optax.scale_by_adam(b1, b2, eps)
    inside = {"adam": adam, "momentum": optax.ema(b1, debias=False), "lion": optax.scale_by_lion(b1, b2)}[inner]
    mover = _proj_optimizer(proj_optimizer, b1, b2, eps)

    from algokit.nn.training import as_key

    key = as_key(rng)

    def init(params: Any) -> OnlineSubspaceState:
        return _init(params, settings, inside, adam, mover, key)

    def update_fn(grads: Any, state: OnlineSubspaceState, params: Any = None) -> tuple[Any, OnlineSubspaceState]:
        return _update(grads, state, params, settings, inside, adam, mover)

    return optax.GradientTransformation(init, update_fn)


def pca_loss(P: Array, G: Array, *, ortho: float = 0.0, normalize: bool = True) -> PcaLoss:
    r"""Online-PCA loss :math:`\lVert PP^\top A-A\rVert_F^2+\lambda\lVert P^\top P-I\rVert_F^2` and its gradient.

    Here :math:`A=G/\lVert G\rVert_F`. With :math:`B=P^\top A`, :math:`C=AB^\top`, :math:`D=BB^\top`,
    :math:`S=P^\top P`, the gradient is :math:`-4C+2CS+2PD+4\lambda P(S-I)`: one product with G beyond the projected
    gradient that the optimiser has anyway.

    Parameters
    ----------
    P : array, shape (n, k)
        Projection, k <= n. NumPy, CuPy, torch, JAX, or another array-API array.
    G : array, shape (n, m)
        Gradient, of the kind of ``P``. Pass the transpose for a projection of the columns.
    ortho : float, default 0.0
        :math:`\lambda`.
    normalize : bool, default True
        Whether to divide G by its Frobenius norm (a zero G stays zero).

    Returns
    -------
    PcaLoss
        Value and gradient; the gradient is of the kind of ``P``.

    Raises
    ------
    TypeError
        If arrays are not numeric, or of different kinds.
    ValueError
        If a shape does not fit, a value is not finite, or ``ortho`` is negative.

    Notes
    -----
    :math:`2nmk` operations beyond :math:`P^\top G`, which take as many, and :math:`O((n+m)k^2)`.

    Examples
    --------
    >>> import numpy as np
    >>> loss = pca_loss(np.array([[1.0], [0.0]]), np.diag([4.0, 3.0]))
    >>> round(loss.value, 2), bool(abs(loss.grad).max() < 1e-12)
    (0.36, True)
    """
    P = check_array(P, "P", ndim=2)
    G = check_array(G, "G", ndim=2)
    if kind_of(P) != kind_of(G):
        raise TypeError(f"P and G must be arrays of one kind, got {kind_of(P)} and {kind_of(G)}")
    if P.shape[0] != G.shape[0] or P.shape[1] > P.shape[0]:
        raise ValueError(f"P must have the rows of G and no more columns than rows, got {P.shape} for G {G.shape}")
    ortho = check_float(ortho, "ortho", low=0)
    normalize = check_bool(normalize, "normalize")
    xp = array_namespace(P, G)
    norm, size = (_norm(xp, G), 1.0) if normalize else (1.0, float(_norm(xp, G)))
    safe = norm if float(norm) > 0 else 1.0
    grad, captured, gram = _pca_gradient(xp, P, G, P.T @ G, safe, ortho)
    defect = gram - xp.eye(P.shape[1], dtype=P.dtype, device=P.device)
    if normalize and float(norm) == 0:
        size = 0.0
    value = size**2 + float(xp.sum(captured * gram) - 2 * xp.linalg.trace(captured))
    value = max(value, 0.0) + (ortho * float(xp.sum(defect * defect)) if ortho else 0.0)
    if not math.isfinite(value) or not bool(xp.all(xp.isfinite(grad))):
        raise ValueError("P and G must be small enough for a finite loss, and ortho too: the loss overflows")
    return PcaLoss(value, grad)


def choose_side(shape: tuple[int, int]) -> Literal["left", "right"]:
    """Side on which a matrix is projected: P always lives on the smaller dimension.

    Parameters
    ----------
    shape : tuple of two ints
        (n, m), both positive.

    Returns
    -------
    {"left", "right"}
        ``"left"`` where n < m: the projected gradient is :math:`P^\\top G`; else ``"right"``: :math:`GP`.

    Raises
    ------
    TypeError, ValueError
        If ``shape`` is not two positive integers.

    Examples
    --------
    >>> choose_side((64, 256)), choose_side((64, 64)), choose_side((256, 64))
    ('left', 'right', 'right')
    """
    if not isinstance(shape, (tuple, list)) or len(shape) != 2:
        raise ValueError(f"shape must be a tuple of two positive integers, got {shape!r}")
    n, m = (check_int(s, "shape", low=1) for s in shape)
    return "left" if n < m else "right"


def subspace_overlap(P: Array, U: Array) -> float:
    r"""Share of the span of ``U`` that lies in the span of ``P``: :math:`\lVert Q_P^\top Q_U\rVert_F^2/k`.

    Parameters
    ----------
    P : array, shape (n, j)
        Independent columns.
    U : array, shape (n, k)
        Independent columns, of the kind of ``P``.

    Returns
    -------
    float
        Mean squared cosine of the principal angles (for j >= k), in [0, 1].

    Raises
    ------
    TypeError
        If arrays are not numeric, or of different kinds.
    ValueError
        If shapes do not fit, values are not finite, or columns are dependent.

    Examples
    --------
    >>> import numpy as np
    >>> round(subspace_overlap(np.array([[1.0], [1.0]]), np.array([[3.0], [0.0]])), 6)
    0.5
    """
    bases = {}
    for name, x in (("P", P), ("U", U)):
        x = check_array(x, name, ndim=2)
        if x.shape[1] > x.shape[0]:
            raise ValueError(f"{name} must have no more columns than rows, got shape {tuple(x.shape)}")
        xp = array_namespace(x)
        left, sizes, _ = xp.linalg.svd(x, full_matrices=False)
        if not float(sizes[-1]) > float(xp.finfo(x.dtype).eps) * x.shape[0] * float(sizes[0]):
            raise ValueError(f"{name} must have independent columns, got singular values down to {float(sizes[-1]):g}")
        bases[name] = left
    if kind_of(bases["P"]) != kind_of(bases["U"]) or bases["P"].dtype != bases["U"].dtype:
        raise TypeError(f"P and U must be arrays of one kind and dtype, got {kind_of(P)} and {kind_of(U)}")
    if bases["P"].shape[0] != bases["U"].shape[0]:
        raise ValueError(f"P and U must have as many rows, got shapes {tuple(P.shape)} and {tuple(U.shape)}")
    xp = array_namespace(*bases.values())
    cosines = bases["P"].T @ bases["U"]
    return min(1.0, float(xp.sum(cosines * cosines)) / bases["U"].shape[1])


def adam_hamiltonian(loss: float, m: Array, v: Array, *, a: float = 1.0, eps: float = 0.0) -> float:
    r"""Lyapunov function :math:`L+\frac1{2a}\sum m^2/(\sqrt v+\epsilon)` of Adam in continuous time.

    It never increases along :math:`\dot W=-P\,m/(\sqrt v+\epsilon)`, :math:`\dot m=a(P^\top\nabla L-m)`,
    :math:`\dot v=b((P^\top\nabla L)^2-v)` if :math:`a\ge b/4`, however P moves.

    Parameters
    ----------
    loss : float
        L(W).
    m, v : array, same shape
        First and second moment, ``v >= 0``.
    a : float, default 1.0
        Positive rate of the first moment.
    eps : float, default 0.0
        Non-negative.

    Returns
    -------
    float
        In the units of ``loss``.

    Raises
    ------
    TypeError
        If arrays are not numeric, or of different kinds.
    ValueError
        If shapes differ, a value is not finite, ``v`` is negative, or a moment has no finite energy (m not zero where
        the square root of v plus eps is).

    Examples
    --------
    >>> import numpy as np
    >>> adam_hamiltonian(1.0, np.array([2.0, 0.0]), np.array([4.0, 0.0]))
    2.0
    """
    loss = check_float(loss, "loss")
    m = check_array(m, "m")
    v = check_array(v, "v", low=0)
    if kind_of(m) != kind_of(v):
        raise TypeError(f"m and v must be arrays of one kind, got {kind_of(m)} and {kind_of(v)}")
    if tuple(m.shape) != tuple(v.shape):
        raise ValueError(f"m and v must have one shape, got {tuple(m.shape)} and {tuple(v.shape)}")
    a = check_float(a, "a", low=0, open_low=True)
    eps = check_float(eps, "eps", low=0)
    xp = array_namespace(m, v)
    root = xp.sqrt(v) + eps
    if bool(xp.any((root == 0) & (m != 0))):
        raise ValueError("v must be positive where m is not zero (or eps must be): the energy is infinite")
    ratio = m / xp.where(root > 0, root, xp.ones_like(root))
    value = loss + float(xp.sum(m * ratio)) / (2 * a)
    if not math.isfinite(value):
        raise ValueError("m must be small enough for a finite energy, and v and a not too small: it overflows")
    return value


# Inside: everything below is traceable by JAX.


def _norm(xp: Any, G: Array) -> Array:
    """Frobenius norm, safe against overflow and underflow of the squares."""
    largest = xp.max(xp.abs(G))
    scaled = G / xp.where(largest > 0, largest, xp.ones_like(largest))
    return largest * xp.sqrt(xp.sum(scaled * scaled))


def _pca_gradient(xp: Any, P: Array, G: Array, projected: Array, norm: Any, ortho: float) -> tuple[Array, Array, Array]:
    """Gradient of the PCA loss of A = G / norm, from ``projected`` = PᵀG; and D = BBᵀ, S = PᵀP."""
    B = projected / norm  # (k, m)
    C = (G @ B.T) / norm  # (n, k): the one new product
    D, S = B @ B.T, P.T @ P  # (k, k)
    grad = -4 * C + 2 * (C @ S) + 2 * (P @ D)
    if ortho:
        grad = grad + 4 * ortho * (P @ S - P)
    return grad, D, S


def _init(params: Any, settings: _Settings, inside: Any, adam: Any, mover: Any, key: Array) -> OnlineSubspaceState:
    jax = require("jax", extra="neural")
    flat, _ = _flatten(params, "params")
    P: dict[str, Any] = {}
    low, rest = {}, {}
    for path, x in flat.items():
        if _is_projected(path, x, settings):
            small, large = min(x.shape), max(x.shape)
            dtype = _working_dtype(x)
            P[path] = _random_frame(jax.random.fold_in(key, len(P)), small, settings.rank, dtype)
            low[path] = jax.numpy.zeros((settings.rank, large), dtype)
        else:
            rest[path] = jax.numpy.zeros(x.shape, _working_dtype(x))
    moving = P if settings.update == "online_pca" else {}
    return OnlineSubspaceState(
        count=jax.numpy.zeros((), jax.numpy.int32),
        P=P,
        subspace=inside.init(low),
        full=adam.init(rest),
        projection={path: mover.init(p) for path, p in moving.items()},
        key=key,
    )


def _update(
    grads: Any, state: OnlineSubspaceState, params: Any, settings: _Settings, inside: Any, adam: Any, mover: Any
) -> tuple[Any, OnlineSubspaceState]:
    jax = require("jax", extra="neural")
    flat, treedef = _flatten(grads, "grads")
    weights = _check_step(flat, state, params, settings)
    G, P, sizes, keys = {}, {}, {}, {}
    for i, (path, old) in enumerate(state.P.items()):
        g = flat[path].astype(old.dtype)
        G[path] = g if choose_side(g.shape) == "left" else g.T  # (n, m), n <= m
        sizes[path] = _norm(jax.numpy, G[path])
        keys[path] = jax.random.fold_in(jax.random.fold_in(state.key, i), state.count + 1)
        P[path] = _refreshed(old, G[path], sizes[path], state.count, keys[path], settings)
    low = {path: P[path].T @ G[path] for path in P}  # (k, m)
    delta, subspace = inside.update(low, state.subspace)
    rest = {path: g.astype(_working_dtype(g)) for path, g in flat.items() if path not in P}
    steps, full = adam.update(rest, state.full)
    for path in P:
        back = settings.scale * (P[path] @ delta[path])  # with the P that projected
        steps[path] = back if choose_side(flat[path].shape) == "left" else back.T
    rate = _at(settings.lr, state.count)
    updates = []
    for path, g in flat.items():
        step = steps[path]
        if settings.weight_decay:
            step = step + settings.weight_decay * weights[path]
        updates.append((-rate * step).astype(g.dtype))
    projection = dict(state.projection)
    for path in P:
        P[path], projection = _moved(
            path, P[path], G[path], low[path], sizes[path], state.count, keys[path], projection, settings, mover
        )
    new = OnlineSubspaceState(state.count + 1, P, subspace, full, projection, state.key)
    return jax.tree_util.tree_unflatten(treedef, updates), new


def _refreshed(P: Array, G: Array, size: Array, step: Array, key: Array, settings: _Settings) -> Array:
    """P before it is used: the first frame, and the refreshes of "svd" and "random"."""
    jax = require("jax", extra="neural")
    jnp = jax.numpy

    def leading() -> Array:
        left = jnp.linalg.svd(G, full_matrices=False)[0][:, : P.shape[1]]
        return jnp.where(size > 0, left, P)

    if settings.update == "random":
        return jax.lax.cond(
            (step > 0) & (step % settings.gap == 0),
            lambda: _random_frame(key, P.shape[0], P.shape[1], P.dtype),
            lambda: P,
        )
    if settings.update == "svd":
        due = step % settings.gap == 0
        due = due & (step > 0) if settings.start == "random" else due
    elif settings.start == "svd":
        due = step == 0
    else:
        return P
    return jax.lax.cond(due, leading, lambda: P)


def _moved(
    path: str, P: Array, G: Array, low: Array, size: Array, step: Array, key: Array, projection: dict[str, Any],
    settings: _Settings, mover: Any,
) -> tuple[Array, dict[str, Any]]:  # fmt: skip
    """P after it was used, and the states of the optimisers of the projections."""
    jax = require("jax", extra="neural")
    jnp = jax.numpy
    if callable(settings.update):
        new = jnp.asarray(settings.update(P, G, step, key), P.dtype)
        if new.shape != P.shape:
            raise ValueError(f"update must return a projection of shape {P.shape} for {path!r}, got {new.shape}")
        return new, projection
    if settings.update != "online_pca":
        return P, projection
    gradient, _, _ = _pca_gradient(jnp, P, G, low, jnp.where(size > 0, size, 1), settings.ortho)
    direction, state = mover.update(gradient, projection[path], P)
    rate = _at(settings.proj_lr, step)
    new = (P - rate * (direction + settings.proj_weight_decay * P)).astype(P.dtype)
    if settings.retract:
        new = _nearest_frame(new)
    moves = size > 0
    if settings.start == "svd":  # P has just been set to where the gradient of the loss vanishes
        moves = moves & (step > 0)
    kept = jax.tree.map(lambda a, b: jnp.where(moves, a, b), (new, state), (P, projection[path]))
    return kept[0], {**projection, path: kept[1]}


def _random_frame(key: Array, n: int, k: int, dtype: Any) -> Array:
    """Uniformly random orthonormal columns."""
    jax = require("jax", extra="neural")
    q, r = jax.numpy.linalg.qr(jax.random.normal(key, (n, k), dtype))
    return q * jax.numpy.where(jax.numpy.diagonal(r) < 0, -1, 1).astype(dtype)


def _nearest_frame(P: Array) -> Array:
    """Polar factor P (PᵀP)^(-1/2)."""
    jnp = require("jax", extra="neural").numpy
    values, vectors = jnp.linalg.eigh(P.T @ P)
    values = jnp.maximum(values, jnp.finfo(P.dtype).eps * values[-1])
    return P @ (vectors / jnp.sqrt(values)) @ vectors.T


def _flatten(tree: Any, name: str) -> tuple[dict[str, Any], Any]:
    """Arrays of a pytree by path, in the order of its leaves, and its structure."""
    util = require("jax", extra="neural").tree_util
    leaves, treedef = util.tree_flatten_with_path(tree)
    flat: dict[str, Any] = {}
    for entries, leaf in leaves:
        path = "/".join(str(getattr(e, "key", getattr(e, "idx", getattr(e, "name", e)))) for e in entries)
        if path in flat:
            raise ValueError(f"{name} has two arrays of path {path!r}")
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(f"{name}[{path!r}] must be an array, got {type(leaf).__name__}")
        flat[path] = leaf
    return flat, treedef


def _is_projected(path: str, x: Any, settings: _Settings) -> bool:
    jnp = require("jax", extra="neural").numpy
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"params[{path!r}] must be of a floating dtype, got {x.dtype}")
    wanted = settings.select(path, x)
    if not isinstance(wanted, (bool,)) and str(getattr(wanted, "dtype", "")) != "bool":
        raise TypeError(f"select must return True or False, got {type(wanted).__name__} for {path!r}")
    if wanted and len(x.shape) != 2:
        raise ValueError(f"select must choose matrices only, got shape {tuple(x.shape)} for {path!r}")
    return bool(wanted) and min(x.shape) > settings.rank


def _default_select(path: str, x: Any) -> bool:
    return len(x.shape) == 2 and path.rpartition("/")[2] not in NOT_PROJECTED


def _check_step(grads: dict[str, Any], state: OnlineSubspaceState, params: Any, settings: _Settings) -> dict[str, Any]:
    """Parameters by path, after checking that gradients, state and parameters belong together."""
    jax = require("jax", extra="neural")
    if not isinstance(state, OnlineSubspaceState):
        raise TypeError(f"state must be an OnlineSubspaceState, got {type(state).__name__}")
    moments = getattr(state.subspace, "mu", None) or getattr(state.subspace, "ema", {})
    first = state.full.mu
    for path in (*state.P, *first):
        if path not in grads:
            raise ValueError(f"grads lacks {path!r}, which the state has")
    weights = {} if params is None else _flatten(params, "params")[0]
    if params is None and settings.weight_decay:
        raise ValueError("params must be given to update: weight_decay needs them")
    for path, g in grads.items():
        if path not in state.P and path not in first:
            raise ValueError(f"grads has {path!r}, which the state lacks")
        if path in state.P:
            good = sorted(g.shape) == [state.P[path].shape[0], moments[path].shape[1]]
        else:
            good = g.shape == first[path].shape
        if params is not None and path not in weights:
            raise ValueError(f"params lacks {path!r}, which grads has")
        if not good or (params is not None and g.shape != weights[path].shape):
            raise ValueError(f"grads[{path!r}] must have the shape of its parameter, got {tuple(g.shape)}")
        if not isinstance(g, jax.core.Tracer) and not bool(jax.numpy.isfinite(g).all()):
            raise ValueError(f"grads[{path!r}] must be finite, got NaN or infinity")
    if extra := [path for path in weights if path not in grads]:
        raise ValueError(f"grads lacks {extra[0]!r}, which params has")
    return weights


def _working_dtype(x: Any) -> Any:
    """The dtype of ``x``, but at least float32."""
    jnp = require("jax", extra="neural").numpy
    return jnp.promote_types(x.dtype, jnp.float32)


def _at(rate: Rate, step: Array) -> Any:
    return rate(step) if callable(rate) else rate


def _check_rate(rate: Any, name: str) -> Rate:
    return rate if callable(rate) else check_float(rate, name, low=0)


def _check_betas(betas: Any) -> tuple[float, float]:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas must be a tuple of two numbers in [0, 1), got {betas!r}")
    b1, b2 = (check_float(b, "betas", low=0, high=1, open_high=True) for b in betas)
    return b1, b2


def _proj_optimizer(choice: Any, b1: float, b2: float, eps: float) -> Any:
    """The optimiser of P as an optax transformation that gives a direction."""
    optax = require("optax", extra="neural")
    if hasattr(choice, "init") and hasattr(choice, "update"):
        return choice
    if not isinstance(choice, str):
        raise TypeError(
            f"proj_optimizer must be one of {PROJ_OPTIMIZERS} or an optax transformation, got {type(choice).__name__}"
        )
    check_one_of(choice, "proj_optimizer", PROJ_OPTIMIZERS)
    if choice == "adam":
        return optax.scale_by_adam(b1, b2, eps)
    if choice == "lion":
        return optax.scale_by_lion(b1, b2)
    if choice == "sgd":
        return optax.identity()
    return optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=1), optax.clip_by_block_rms(1.0))
