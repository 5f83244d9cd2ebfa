"""Optimisation: iterations that reach the same answer sooner."""

from algokit._lazy import lazy_submodules

__getattr__, __dir__, __all__ = lazy_submodules(__name__, __path__)
