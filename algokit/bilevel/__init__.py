"""Bilevel optimisation: learning what a lower problem should solve, without solving it again and again."""

from algokit._lazy import lazy_submodules

__getattr__, __dir__, __all__ = lazy_submodules(__name__, __path__)
