"""scikit-learn estimators on randomised numerical linear algebra, for tables that other libraries give up on.

The room stands alone: it needs NumPy, SciPy, scikit-learn and PyArrow, and Dask for its collections and clusters.
"""

from fullrank.extras import needs

with needs("randomized", "fullrank.randomized"):
    from fullrank.randomized.calibration import LogitCalibrator
    from fullrank.randomized.discrepancy import box_discrepancy
    from fullrank.randomized.generalized_linear import SubsampledNewtonClassifier, SubsampledNewtonRegressor
    from fullrank.randomized.inference import StandardErrors, standard_errors
    from fullrank.randomized.least_squares import LstsqResult, lstsq
    from fullrank.randomized.leverage import leverage_scores
    from fullrank.randomized.linear_regression import RandomizedLinearRegression, RandomizedRidge
    from fullrank.randomized.parquet import ParquetSource
    from fullrank.randomized.pwsgd import PreconditionedSGDRegressor
    from fullrank.randomized.qmc import QMCFeatures, kernel_error
    from fullrank.randomized.quantile import LADRegressor, QuantileRegressor
    from fullrank.randomized.sketches import Sketch, sketch
    from fullrank.randomized.sources import ArraySource, DaskSource, RowSource
    from fullrank.randomized.tensor_machine import TensorMachineClassifier, TensorMachineRegressor

__all__ = [
    "ArraySource",
    "DaskSource",
    "LADRegressor",
    "LogitCalibrator",
    "LstsqResult",
    "ParquetSource",
    "PreconditionedSGDRegressor",
    "QMCFeatures",
    "QuantileRegressor",
    "RandomizedLinearRegression",
    "RandomizedRidge",
    "RowSource",
    "Sketch",
    "StandardErrors",
    "SubsampledNewtonClassifier",
    "SubsampledNewtonRegressor",
    "TensorMachineClassifier",
    "TensorMachineRegressor",
    "box_discrepancy",
    "kernel_error",
    "leverage_scores",
    "lstsq",
    "sketch",
    "standard_errors",
]
