"""Compression: models in fewer bits, fewer weights or fewer layers."""

from algokit._lazy import lazy_submodules

__getattr__, __dir__, __all__ = lazy_submodules(__name__, __path__)
