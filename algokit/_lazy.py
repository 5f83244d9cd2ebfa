"""Submodules that load on first attribute access (PEP 562)."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from types import ModuleType

__all__ = ["lazy_submodules", "require"]


def lazy_submodules(
    package: str, path: Iterable[str]
) -> tuple[Callable[[str], ModuleType], Callable[[], list[str]], list[str]]:
    """The ``__getattr__``, ``__dir__`` and ``__all__`` of a package whose submodules are imported on first access.

    Parameters
    ----------
    package : str
        The package's ``__name__``.
    path : iterable of str
        The package's ``__path__``.

    Returns
    -------
    tuple
        ``(__getattr__, __dir__, __all__)``, to be assigned at the package's top level.
    """
    names = sorted(m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_"))

    def __getattr__(name: str) -> ModuleType:
        if name in names:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return names

    return __getattr__, __dir__, names


def require(module: str, *, extra: str) -> ModuleType:
    """Import ``module``, or say which extra of the package brings it.

    Parameters
    ----------
    module : str
        Name of a module that an extra installs.
    extra : str
        Name of that extra.

    Returns
    -------
    module
        The imported module.

    Raises
    ------
    ModuleNotFoundError
        If it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise  # it is there, but lacks something of its own
        raise ModuleNotFoundError(
            f"this needs {module}, which comes with the extra {extra!r} of algokit-book: install algokit-book[{extra}]",
            name=module,
        ) from None
