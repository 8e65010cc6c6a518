# Two commands: `make demo` and `make test`. They need python3 >= 3.10 and make, nothing else.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test bench lint types clean

demo: .venv/demo
	$(BIN)/tqai demo

test: .venv/dev lint types
	$(BIN)/python -m pytest

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev
	$(BIN)/mypy

bench: .venv/demo
	$(BIN)/tqai bench dit --json benchmarks/results/dit.json

# torch alone first: pulled in by another package it may be a build of several GB
.venv/torch: constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "tqai needs Python 3.10 or newer"'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	touch $@

.venv/demo: .venv/torch pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
	touch $@

.venv/dev: .venv/torch pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@ .venv/demo

clean:
	rm -rf .venv out build *.egg-info
