# `make train` and `make test` are the two commands, `make experiments-quick` the third; all first make .venv, once.

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

EXPERIMENTS := memory_reduced anil_convergence imaml lambda_patterns multi_step fields neighbours test_time_training

.PHONY: setup train test test-long experiments-quick bench-quick clean

setup: .venv/.installed

# Choices go through, as in `make train ARGS="--seed 1"`. The minutes are a guard for slow machines.
train: setup
	$(BIN)/innerloop train --minutes 6.5 $(ARGS)

# One thread for each of the two processes that run the tests.
test: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

# What a run survives, ten times as often: 200 kills, 2,000 damaged copies of each file.
test-long: setup
	OMP_NUM_THREADS=1 INNERLOOP_KILLS=200 INNERLOOP_FLIPS=2000 $(BIN)/pytest tests/test_reliability.py

# The claims of the papers, each in the direction that it has on a small task.
experiments-quick: setup
	set -e; for each in $(EXPERIMENTS); do OMP_NUM_THREADS=1 $(BIN)/python experiments/$$each/run.py --quick; done

# Ratios beside their committed bounds, in under two minutes.
bench-quick: setup
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/speed.py --quick

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache

# setuptools comes first and builds without isolation, so that its version is a pinned one too.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "innerloop needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1 || true):" \
			"install one and name it, as in 'make setup PYTHON=python3.12'" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) install --constraint $(CONSTRAINTS) setuptools
	$(PIP) install --constraint $(CONSTRAINTS) --no-build-isolation --editable '.[dev,onnx,peers,serve]'
	@touch $@
