"""Probabilistic inference: mixtures, flows, transport and message passing."""

from algokit._lazy import lazy_submodules

__getattr__, __dir__, __all__ = lazy_submodules(__name__, __path__)
