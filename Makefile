# `make demo` and `make test` are the two commands of the README. Each makes its own environment in .venv first.
#
# pip takes everything from where it is configured to look. PyTorch's wheel on the default index is the CUDA build (several GB); to take
# the much smaller CPU build instead, point pip at the index that has it, for example: PIP_EXTRA_INDEX_URL=<index of CPU wheels> make test
# PYTHON chooses the interpreter (3.11 or newer), VENV the folder of the environment.

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= cpu,tensorrt-rtx,dev
BIN := $(VENV)/bin
STAMP := $(VENV)/installed.stamp

.PHONY: help demo test test-all lint types links tables accuracy agreement families formats memory precision sequential tuning performance gpu clean

help:
	@echo "make demo      export, prune, build, check and ask the shipped model"
	@echo "make test      run the tests that need no GPU"
	@echo "make test-all  the same, and all pairs where the tests take a covering choice (long)"
	@echo "make lint      ruff: rules and formatting"
	@echo "make types     mypy --strict"
	@echo "make links     refresh what type checkers see, after adding a file to api/"
	@echo "make accuracy  the accuracy table of the shipped model (long)"
	@echo "make agreement every selector against PyTorch on the shipped model, and built for TensorRT for RTX (long)"
	@echo "make families  every model family, from checkpoint to engines (long)"
	@echo "make formats   every number format of prefill and decode, built for TensorRT for RTX: sizes (long; 10 GB of disk)"
	@echo "make memory    peak memory from a checkpoint to engines, at 0.5 and 3 billion parameters (long; 25 GB of disk)"
	@echo "make precision what number formats cost the shipped model (long)"
	@echo "make sequential what selectors that choose one by one cost"
	@echo "make tuning    what the search of the pruning budget finds on the shipped model (long)"
	@echo "make performance prefill, decode and selecting against their limits (long)"
	@echo "make gpu       engines on this machine's GPU against PyTorch: gpu.json (long; not yet run by this project)"
	@echo "make tables    whether the committed tables still measure this code"
	@echo "make clean     remove the environment and the caches"

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not gpu and not exhaustive" $(PYTEST_ARGS)

test-all: $(STAMP)
	$(BIN)/python -m pytest -q -m "not gpu" $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

types: $(STAMP)
	$(BIN)/python -m mypy

# The modules of api/ are the package `sievert` itself, so each has a link of its own beside those of the folders.
links:
	find .typing/sievert -type l -delete
	cd .typing/sievert && ln -s ../../bundle ../../calibration ../../engines ../../exporter ../../graph_passes ../../parity ../../api/*.py ../../api/py.typed .

tables: $(STAMP)
	$(BIN)/python benchmarks/stale.py

accuracy: $(STAMP)
	$(BIN)/python benchmarks/accuracy.py

agreement: $(STAMP)
	$(BIN)/python benchmarks/agreement.py

families: $(STAMP)
	$(BIN)/python benchmarks/families.py

formats: $(STAMP)
	$(BIN)/python benchmarks/formats.py

memory: $(STAMP)
	$(BIN)/python benchmarks/memory.py

precision: $(STAMP)
	$(BIN)/python benchmarks/precision.py

sequential: $(STAMP)
	$(BIN)/python benchmarks/sequential.py --rtx

tuning: $(STAMP)
	$(BIN)/python benchmarks/tuning.py

performance: $(STAMP)
	$(BIN)/python benchmarks/performance.py

# The engines of a GPU have extras of their own: make gpu VENV=.venv-gpu EXTRAS=gpu,tensorrt-rtx,dev
gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu.py --out gpu.json $(GPU_ARGS)

# PyTorch goes in first: the pin decides its build once, and nothing later can swap it. setuptools comes with it, so that our own
# build takes the pinned one instead of fetching another.
# The old environment is removed, so that a package dropped from the constraints does not linger in it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed, $(PYTHON) is older: make PYTHON=python3.12 ..."; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[$(EXTRAS)]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist sievert.egg-info
