"""scikit-learn estimators on randomised numerical linear algebra, for tables that other libraries give up on.

The room stands alone: it needs NumPy, SciPy, scikit-learn and PyArrow, and Dask for its collections and clusters.
"""

from fullrank.randomized.discrepancy import box_discrepancy
from fullrank.randomized.qmc import QMCFeatures, kernel_error
from fullrank.randomized.sketches import Sketch, sketch
from fullrank.randomized.sources import ArraySource, DaskSource, ParquetSource, RowSource

__all__ = [
    "ArraySource",
    "DaskSource",
    "ParquetSource",
    "QMCFeatures",
    "RowSource",
    "Sketch",
    "box_discrepancy",
    "kernel_error",
    "sketch",
]
