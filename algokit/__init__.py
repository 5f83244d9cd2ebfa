"""The algorithms of the book *Papers, Executed*: one module per paper, ``algokit.<part>.<slug>``.

Importing this package is cheap: parts and modules load on first use.

>>> import algokit
>>> algokit.optimization.bradley_terry.bradley_terry([[0, 3], [1, 0]]).strengths.round(3)
array([1.732, 0.577])
"""

from algokit._lazy import lazy_submodules

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_submodules(__name__, __path__)
