"""Nested dicts of arrays, with a path for each: ``{"blocks": {"0": {"query": W}}}`` holds ``blocks/0/query``.

All models of :mod:`algokit.nn` keep their parameters in such trees, so an adapter, a quantiser or a pruner is a
function from tree to tree that picks its arrays by path. The same trees are JAX pytrees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["flatten", "map_paths", "unflatten"]

Tree = dict[str, Any]


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of a nested dict by path, in the order in which they stand in the tree.

    Parameters
    ----------
    tree : nested dict of str to array
        No key may hold a slash.

    Returns
    -------
    dict of str to array
        ``{"blocks/0/query": W, ...}``.

    Raises
    ------
    TypeError
        If ``tree`` is not a dict, or a key of it is not a string.
    ValueError
        If a key holds a slash or is empty.

    Examples
    --------
    >>> flatten({"blocks": {"0": {"query": 1, "key": 2}}, "norm": 3})
    {'blocks/0/query': 1, 'blocks/0/key': 2, 'norm': 3}
    """
    if not isinstance(tree, Mapping):
        raise TypeError(f"tree must be a nested dict of arrays, got {type(tree).__name__}")
    flat: dict[str, Any] = {}
    _collect(tree, "", flat)
    return flat


def _collect(tree: Mapping[str, Any], prefix: str, flat: dict[str, Any]) -> None:
    for key, value in tree.items():
        if not isinstance(key, str):
            raise TypeError(f"tree must have strings as keys, got {key!r} under {prefix or 'its root'!r}")
        if not key or "/" in key:
            raise ValueError(
                f"tree must have non-empty keys without a slash, got {key!r} under {prefix or 'its root'!r}"
            )
        if isinstance(value, Mapping):
            _collect(value, f"{prefix}{key}/", flat)
        else:
            flat[prefix + key] = value


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """The nested dict whose arrays have these paths: the inverse of :func:`flatten`.

    Parameters
    ----------
    flat : dict of str to array
        Arrays by path.

    Returns
    -------
    nested dict
        A new tree; the arrays are shared.

    Raises
    ------
    TypeError
        If ``flat`` is not a dict.
    ValueError
        If one path runs through another (``"a"`` and ``"a/b"``), or a part of a path is empty.

    Examples
    --------
    >>> unflatten({"blocks/0/query": 1, "blocks/0/key": 2})
    {'blocks': {'0': {'query': 1, 'key': 2}}}
    """
    if not isinstance(flat, Mapping):
        raise TypeError(f"flat must be a dict of paths to arrays, got {type(flat).__name__}")
    tree: Tree = {}
    for path, value in flat.items():
        *parents, last = str(path).split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"flat has a path that runs through another array: {path!r}")
        if last in node or not all((*parents, last)):
            raise ValueError(f"flat has a path that is a folder of another, or has an empty part: {path!r}")
        node[last] = value
    return tree


def map_paths(f: Callable[[str, Any], Any], tree: Mapping[str, Any]) -> Tree:
    """The tree whose array at each path is ``f(path, array)``.

    Parameters
    ----------
    f : callable
        Called once per array with its path and itself.
    tree : nested dict of arrays
        Left unchanged.

    Returns
    -------
    nested dict
        The same paths, new arrays.

    Raises
    ------
    TypeError
        If ``f`` is not callable or ``tree`` not a dict.

    Examples
    --------
    >>> map_paths(lambda path, x: 0 * x if path.endswith("key") else x, {"0": {"query": 1, "key": 2}})
    {'0': {'query': 1, 'key': 0}}
    """
    if not callable(f):
        raise TypeError(f"f must be callable, got {type(f).__name__}")
    return unflatten({path: f(path, leaf) for path, leaf in flatten(tree).items()})


def check_like(tree: Any, shapes: Mapping[str, tuple[int, ...]], name: str) -> None:
    """Refuse a tree that lacks a path, has one too many, or holds an array of the wrong shape.

    Parameters
    ----------
    tree : nested dict of arrays
        What to check.
    shapes : dict of str to tuple of int
        The shape that belongs to each path.
    name : str
        Name of the argument, for the message.

    Raises
    ------
    TypeError
        If ``tree`` is not a nested dict of arrays.
    ValueError
        With the path that is missing, unknown or wrong.

    Examples
    --------
    >>> import numpy as np
    >>> check_like({"0": {"bias": np.zeros(3)}}, {"0/bias": (4,)}, "params")
    Traceback (most recent call last):
        ...
    ValueError: params['0/bias'] must have shape (4,), got (3,)
    """
    if not isinstance(tree, Mapping):
        raise TypeError(f"{name} must be a nested dict of arrays, got {type(tree).__name__}")
    try:
        flat = flatten(tree)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
    for path, shape in shapes.items():
        if path not in flat:
            raise ValueError(f"{name} lacks {path!r}; it has {_some(flat)}")
        found = getattr(flat[path], "shape", None)
        if found is None:
            raise TypeError(f"{name}[{path!r}] must be an array, got {type(flat[path]).__name__}")
        if tuple(found) != tuple(shape):
            raise ValueError(f"{name}[{path!r}] must have shape {tuple(shape)}, got {tuple(found)}")
    if extra := [path for path in flat if path not in shapes]:
        raise ValueError(f"{name} has {extra[0]!r}, which this model does not know; it knows {_some(shapes)}")


def _some(paths: Mapping[str, Any], limit: int = 4) -> str:
    """The first few paths, for a message."""
    names = list(paths)
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "") if names else "nothing"
