"""Small networks in JAX, as plain functions on nested dicts of arrays: models, training, text, a tiny language model.

Needs the extra ``neural`` (JAX and optax), except :mod:`~algokit.nn.text`, :mod:`~algokit.nn.tasks`,
:mod:`~algokit.nn.ngram` and :mod:`~algokit.nn.trees`, which are NumPy. Nothing else in the core imports it.
"""

from algokit._lazy import lazy_submodules

__getattr__, __dir__, __all__ = lazy_submodules(__name__, __path__)
