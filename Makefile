# The newcomer's commands: `make demo` and `make test`. Both set up .venv first, once.
# Where this is set, every process would compile torch and transformers anew: 15 seconds each.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.attnopt-setup

GPU_RESULT := benchmarks/results/gpu.json

.PHONY: help setup demo test test-slow gpu lint format clean

help:
	@echo "make demo       install, then convert a real model and compare it with the original (a few minutes)"
	@echo "make test       install, then run the fast tests"
	@echo "make test-slow  the tests that need the real model or minutes"
	@echo "make gpu        kernels on a CUDA device: correctness and speed, into $(GPU_RESULT)"
	@echo "make lint       ruff and mypy"
	@echo "make setup      only install, into $(VENV)"
	@echo "make clean      remove $(VENV) and caches"

setup: $(STAMP)

# pip's byte compiling costs half a minute for files most of which are never imported; Python compiles on first import
# (and keeps the result: see the top).
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "attnopt needs Python 3.11 or newer; name one with make PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing attnopt and its test tools into $(VENV) (a minute or two)"
	@$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	@$(BIN)/attnopt demo

test: setup
	$(BIN)/python -m pytest

test-slow: setup
	$(BIN)/python -m pytest -m slow

gpu: setup
	$(BIN)/python benchmarks/gpu.py --out $(GPU_RESULT)

lint: setup
	$(BIN)/ruff check attnopt tests benchmarks
	$(BIN)/ruff format --check attnopt tests benchmarks
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix attnopt tests benchmarks
	$(BIN)/ruff format attnopt tests benchmarks

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find attnopt tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
