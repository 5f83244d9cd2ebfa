"""Bad input, thrown at every public function and estimator of every part.

Each tests/<part>/test_<slug>.py declares one valid, tiny call per public function, constructor and method in its
``EXAMPLES`` (see book/writing_a_chapter.md). Here every argument is damaged in turn. What is not legal must come out as
ValueError, TypeError or NotFittedError with the argument's name in the message, and arguments must stay unchanged.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import pkgutil
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError

import algokit

TESTS = Path(__file__).parent
CORE = ("checks", "claims", "plotting", "races", "data", "arrays")


class Call(NamedTuple):
    """One valid call: ``target(**kwargs)`` on what ``build`` makes."""

    label: str  # "fwht", "BradleyTerry.fit"
    build: Callable[[], Callable[..., Any]]
    kwargs: dict[str, Any]
    accepts: dict[str, set[str]]


def _modules() -> Iterator[tuple[ModuleType, Path]]:
    """Every public module of every part with the path of its tests; then the modules of the core."""
    for part in pkgutil.iter_modules(algokit.__path__):
        if part.ispkg:
            package = importlib.import_module(f"algokit.{part.name}")
            for module in pkgutil.iter_modules(package.__path__):
                if not module.name.startswith("_"):
                    yield (
                        importlib.import_module(f"algokit.{part.name}.{module.name}"),
                        TESTS / part.name / f"test_{module.name}.py",
                    )
    for name in CORE:
        yield importlib.import_module(f"algokit.{name}"), TESTS / f"test_{name}.py"


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{path.parent.name}_{path.stem}", path)
    assert spec is not None and spec.loader is not None, f"{path} is missing"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _public(module: ModuleType) -> list[str]:
    """What needs an example: functions, constructors of classes with behaviour, and the methods a class defines."""
    names = []
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.isclass(thing):
            if getattr(thing, "_is_protocol", False):  # says what others must have
                continue
            record = issubclass(thing, (tuple, Exception)) or is_dataclass(thing)
            if not record:
                names.append(name)
            names += [
                f"{name}.{m}"
                for m, f in vars(thing).items()
                if inspect.isfunction(f) and not m.startswith("_") and len(inspect.signature(f).parameters) > 1
            ]
        elif inspect.isfunction(thing) and inspect.signature(thing).parameters:
            names.append(name)
    return names


def _calls() -> tuple[list[Call], list[str]]:
    calls, missing = [], []
    for module, path in _modules():
        wanted = _public(module)
        if module.__name__.split(".")[1] in CORE:
            wanted = [w for w in wanted if w in getattr(_load(path), "EXAMPLES", {})] if path.exists() else []
        if not wanted:
            continue
        if not path.exists():
            missing.append(f"{path} does not exist: write it, with EXAMPLES for {wanted}")
            continue
        tests = _load(path)
        examples, accepts = getattr(tests, "EXAMPLES", {}), getattr(tests, "ACCEPTS", {})
        for name in wanted:
            if name not in examples:
                missing.append(f"{path}: EXAMPLES has no entry for {name!r}; add one valid, tiny call")
                continue
            legal = {k.rpartition(".")[2]: v for k, v in accepts.items() if k.rpartition(".")[0] == name}
            calls.append(_call(module, name, examples, legal))
    return calls, missing


def _call(module: ModuleType, name: str, examples: dict[str, Any], accepts: dict[str, set[str]]) -> Call:
    label = f"{module.__name__.removeprefix('algokit.')}:{name}"
    example = examples[name]
    owner, _, method = name.partition(".")
    thing = getattr(module, owner)
    if isinstance(example, tuple):  # (factory of the instance, kwargs)
        factory, kwargs = example
        return Call(label, lambda: getattr(factory(), method), kwargs, accepts)
    if not method:
        if inspect.isclass(thing) and issubclass(thing, BaseEstimator):  # parameters are checked by fit
            fit = examples[f"{owner}.fit"]
            return Call(label, lambda: lambda **params: thing(**params).fit(**copy.deepcopy(fit)), example, accepts)
        return Call(label, lambda: thing, example, accepts)

    def bound() -> Callable[..., Any]:
        estimator = thing(**copy.deepcopy(examples[owner]))
        if method not in ("fit", "partial_fit", "fit_transform"):
            estimator.fit(**copy.deepcopy(examples[f"{owner}.fit"]))
        return getattr(estimator, method)

    return Call(label, bound, example, accepts)


# What is never legal must raise; the rest may raise, cleanly, or be served.
NEVER_LEGAL = {"string", "object", "dict", "nan", "inf", "empty", "word"}


def _damage(value: Any) -> Iterator[tuple[str, Any]]:
    """Damaged versions of a valid argument, by name."""
    yield "dict", {"a": 1}
    yield "none", None
    if sp.issparse(value):
        for kind, number in (("nan", np.nan), ("inf", np.inf), ("negative", -1.0)):
            broken = sp.csr_array(value, dtype=float, copy=True)
            broken.data[0] = number
            yield kind, broken
    elif isinstance(value, np.ndarray) or (
        isinstance(value, (list, tuple)) and value and not isinstance(value[0], (str, list, tuple))
    ):
        array = np.asarray(value)
        if array.dtype.kind not in "OUS":
            yield "string", np.full(array.shape, "word")
            yield "object", np.full(array.shape, object(), dtype=object)
        yield "ndim", array[..., None]
        yield "ndim", array.reshape(-1)[0]
        if array.ndim:
            yield "empty", array[:0]
            yield "short", array[:-1]
        if array.dtype.kind in "biuf":
            for kind, number in (("nan", np.nan), ("inf", np.inf), ("negative", -1.0), ("zero", 0.0), ("huge", 1e300)):
                broken = array.astype(float)
                broken.reshape(-1)[0] = number
                yield kind, broken
    elif isinstance(value, bool):
        yield "word", "nonsense"
    elif isinstance(value, (int, float, np.number)):
        yield "word", "nonsense"
        yield "nan", float("nan")
        yield "inf", float("inf")
        yield "negative", -value - 1
        yield "zero", type(value)(0)
        yield "ndim", np.ones(3)
        yield "huge", 10**19 if isinstance(value, (int, np.integer)) else 1e300
        if isinstance(value, (int, np.integer)):
            yield "fraction", value + 0.5
    elif isinstance(value, str):
        yield "word", "nonsense"
        yield "negative", -3


CALLS, MISSING = _calls()


def test_every_public_function_declares_an_example() -> None:
    assert not MISSING, "\n".join(MISSING)


@pytest.mark.parametrize("call", CALLS, ids=lambda c: c.label)
def test_example_is_valid(call: Call) -> None:
    kwargs = copy.deepcopy(call.kwargs)
    call.build()(**kwargs)
    _assert_unchanged(kwargs, call.kwargs)


@pytest.mark.parametrize(
    ("call", "argument"), [pytest.param(c, a, id=f"{c.label}({a})") for c in CALLS for a in c.kwargs]
)
def test_bad_input_is_refused_by_name(call: Call, argument: str) -> None:
    legal = call.accepts.get(argument, set())
    for kind, damaged in _damage(call.kwargs[argument]):
        kwargs = {**copy.deepcopy(call.kwargs), argument: damaged}
        before = copy.deepcopy(kwargs)
        function = call.build()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                function(**kwargs)
        except (ValueError, TypeError, NotFittedError) as error:
            assert _names(str(error), argument), f"{call.label}: {argument} is {kind}; not named in: {error}"
        except Exception as error:
            pytest.fail(
                f"{call.label}: {argument} is {kind}: raised {type(error).__name__} instead of ValueError: {error}"
            )
        else:
            assert kind not in NEVER_LEGAL or kind in legal, f"{call.label}: {argument} is {kind} and was accepted"
        _assert_unchanged(kwargs, before)


def _names(message: str, argument: str) -> bool:
    """Whether a message names the argument; scikit-learn's own messages about X and y speak of the data instead."""
    sklearn = argument in ("X", "y") and re.search(
        r"array|sample|feature|label|class|target|Reshape|dtype|convert string|float\(\) argument", message
    )
    return bool(sklearn or re.search(rf"\b{argument}\b", message))


def _assert_unchanged(after: dict[str, Any], before: dict[str, Any]) -> None:
    for name, value in before.items():
        if name in ("overwrite",) or after.get("overwrite"):
            continue
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            np.testing.assert_array_equal(after[name], value, err_msg=f"the call changed its argument {name}")
