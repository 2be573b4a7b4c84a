"""One numeric thread a process, as long as nothing else is asked for: the problems are small, a machine that does other
work too makes thread pools wait for each other for minutes. Tests of several threads ask for them."""

import os

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
