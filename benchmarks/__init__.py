"""Programs that print every number of the README and the docs: `python -m benchmarks.NAME` in the repository's root.

`python -m benchmarks` lists them. Results are written to `benchmarks/results/`, with the machine, the versions and the
date. `benchmarks/peers/` is not part of the package: its scripts are started by their path with the interpreter of a
peer's environment, which has no fullrank, and need nothing from here.
"""
