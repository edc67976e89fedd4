"""The estimators of `fullrank.randomized` and their peers, on one thread: set here, before any of them loads NumPy."""

import os

THREADS = 1
for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[_name] = str(THREADS)
# Kernels as OpenBLAS chooses them for the processor, whatever the shell says.
for _name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
    os.environ.pop(_name, None)
