"""Training: the same model with less memory, or a better one from the same memory."""

from algokit._lazy import lazy_submodules

__getattr__, __dir__, __all__ = lazy_submodules(__name__, __path__)
