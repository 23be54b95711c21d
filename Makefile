# `make demo` and `make test` work as the first command in a fresh clone: they make .venv themselves.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The first interpreter on PATH that is new enough and not too new; name another with `make PYTHON=...`.
IN_RANGE := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c '$(IN_RANGE)' 2>/dev/null && echo $$python && break; done)

.PHONY: help demo test test-all lint format bench clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo      prune the embedded model and compare, offline, in a minute'
	@echo 'make test      linters, types and tests'
	@echo 'make test-all  the same with the slow tests: every model type of transformers'
	@echo 'make lint      linters, types, and which room imports which'
	@echo 'make format    let ruff rewrite what it can'
	@echo 'make bench     run every benchmark script'
	@echo 'make clean     remove the environment and all caches'

$(STAMP): pyproject.toml constraints.txt
	@$(or $(PYTHON),false) -c '$(IN_RANGE)' || \
		{ echo "trim needs Python 3.11, 3.12 or 3.13; name one with: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/trim demo

lint: $(STAMP)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports

# The matrices of the tests are tiny, so one process a core is quicker than threads inside of one.
test: lint
	@OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto

test-all: lint
	@OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto -m 'slow or not slow'

format: $(STAMP)
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

bench: $(STAMP)
	@set -e; for script in benchmarks/*.py; do \
		name=$$(basename "$$script" .py); echo "== $$name"; $(BIN)/python -m "benchmarks.$$name"; done

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
