"""Matrices: factorisations and averages that respect what the entries mean."""

from algokit._lazy import lazy_submodules

__getattr__, __dir__, __all__ = lazy_submodules(__name__, __path__)
