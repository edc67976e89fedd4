# Everything runs in a virtual environment of its own; the first target that needs it makes it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Idle OpenMP threads soon sleep: spinning for long, as they do by default, they starve each other on a busy machine.
export GOMP_SPINCOUNT ?= 30000

.PHONY: demo test lint types docs bench install install-distributed clean

demo: $(STAMP)
	$(BIN)/fullrank demo --out runs/demo

# Two processes; the tests of a file share what they set up, so they stay together. JOBS=0 is one, without xdist's workers.
JOBS ?= 2

test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --cov=fullrank --cov-report=term:skip-covered

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(STAMP)
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/mkdocs build --strict

# Lists the benchmarks; runs one with NAME=ctr_throughput, which gets ARGS.
bench: $(STAMP)
	@$(BIN)/python -m benchmarks$(addprefix .,$(NAME)) $(ARGS)

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fullrank needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "Python cannot make a virtual environment; on Debian install python3-venv" >&2; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,distributed,docs,dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps torchrec==1.8.0
	@touch $@

# TorchRec's own metadata asks for the CUDA build of FBGEMM, whose files overwrite the CPU build's: hence --no-deps.
install-distributed: $(STAMP)

clean:
	rm -rf $(VENV) site runs build dist .pytest_cache .mypy_cache .ruff_cache
