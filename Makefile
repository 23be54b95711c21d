# `make demo` and `make test` work as the first command in a fresh clone: they make .venv themselves.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The first interpreter on PATH that is new enough and not too new; name another with `make PYTHON=...`.
IN_RANGE := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c '$(IN_RANGE)' 2>/dev/null && echo $$python && break; done)

.PHONY: help demo demo-real test test-all lint format bench torture fuzz clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo      prune the embedded model and compare, offline, in a minute'
	@echo 'make demo-real prune a real model of 135M weights, which the package index holds, by the recommended recipe'
	@echo 'make test      linters, types and tests'
	@echo 'make test-all  the same with the slow tests: every model type of transformers'
	@echo 'make lint      linters, types, and which room imports which'
	@echo 'make format    let ruff rewrite what it can'
	@echo 'make bench     run the benchmark scripts that take minutes'
	@echo 'make torture   kill every command at random moments, fail every write, run two at once'
	@echo 'make fuzz      damaged files of every kind and random command lines'
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

# SmolLM2-135M, calibrated on Python's help topics and measured on those that calibration left out.
REAL := .demo/SmolLM2-135M
demo-real: $(STAMP)
	@mkdir -p .demo
	$(BIN)/python -m benchmarks.smollm2 -o $(REAL)
	@$(BIN)/python -c 'import pathlib, trimcli.demo as demo; demo.write_texts(pathlib.Path(".demo"))'
	$(BIN)/trim prune $(REAL) --sparsity 0.6 --preset balanced --save-model $(REAL)-60 --force \
		--dataset .demo/topics.calibration.txt --nsamples 64 --seqlen 256
	$(BIN)/trim verify $(REAL)-60
	$(BIN)/trim eval $(REAL) -o .demo/dense.json --ppl .demo/topics.measurement.txt --seqlen 256 --force
	$(BIN)/trim eval $(REAL)-60 -o .demo/pruned.json --ppl .demo/topics.measurement.txt --seqlen 256 --force
	$(BIN)/trim compare .demo/dense.json .demo/pruned.json

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

# Not quality.py, recovery.py and limits.py, which take hours, not what writes a model, and not what has a target here.
APART := $(addprefix benchmarks/,quality.py recovery.py limits.py smollm2.py torture.py fuzz.py)
BENCHES := $(filter-out $(APART),$(wildcard benchmarks/*.py))
bench: $(STAMP)
	@set -e; for script in $(BENCHES); do \
		name=$$(basename "$$script" .py); echo "== $$name"; $(BIN)/python -m "benchmarks.$$name"; done

# Other seeds, smaller parts: make torture ARGS='--seed 1 --kills 20 --faults 50 --pairs 5'
torture: ARGS := --seed 0 --kills 200 --faults all --pairs 50 --out benchmarks/results-torture.md
torture: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.torture $(ARGS)

fuzz: ARGS := --seed 0 --examples 10000 --lines 2000 --out benchmarks/results-fuzz.md
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.fuzz $(ARGS)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
