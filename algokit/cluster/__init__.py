"""More than one machine: mergeable summaries over threads, Dask and Spark.

Needs the extra ``cluster`` (Dask and PySpark) only where a cluster is used: threads of this machine need nothing.
"""

from algokit._lazy import lazy_submodules

__getattr__, __dir__, __all__ = lazy_submodules(__name__, __path__)
