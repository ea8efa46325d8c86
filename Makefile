# Every target sets up .venv first, stops at the first failure and ends with one sentence.
#
#   make demo                                   a real model made better on real data, offline
#   make test                                   everything that a change must pass
#   make PIP_ARGS="--extra-index-url URL" demo  PIP_ARGS goes to pip, for instance an index with CPU builds of torch
#   make PYTHON=python3.13 WORKERS=8 test

PYTHON  ?= python3
PIP_ARGS ?=
WORKERS ?= 2

VENV  := .venv
PY    := $(VENV)/bin/python
STAMP := $(VENV)/installed
PIP   := $(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt
# One thread per worker, or the workers fight for the cores.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo style types check test test-all bench bench-all docs docs-build clean

help:
	@echo "make setup | demo | check | test | test-all | bench | bench-all | docs | clean     (CONTRIBUTING.md says when)"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rankfold needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.11 setup")'
	@echo "Setting up $(VENV): about a minute, longer where torch has to be downloaded."
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --no-build-isolation -e '.[demo,test,docs]'
	@touch $(STAMP)

setup: $(STAMP)
	@echo "$(VENV) is ready."

demo: $(STAMP)
	$(VENV)/bin/rankfold demo --out runs/demo

style: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports
types: style
	$(PY) -m mypy

check: types
	$(PYTEST) -x -m "not full" --ignore=tests/laws
	@echo "Check passed: style, imports, types and the fast tests; the laws run in make test."

test: types
	$(PYTEST) -m "not full"
	@$(MAKE) --no-print-directory docs-build
	@echo "All tests passed: style, imports, types, tests, laws and documentation."

test-all: types
	$(PYTEST)
	@$(MAKE) --no-print-directory docs-build
	@echo "All tests passed, the full ones included."

bench: $(STAMP)
	$(PY) -m benchmarks
	@echo "Benchmarks are written; make bench-all runs every cell."

bench-all: $(STAMP)
	$(PY) -m benchmarks --all
	@echo "Every cell of the benchmarks is written."

docs-build: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

docs: docs-build
	@echo "The documentation is in site/index.html."

clean:
	rm -rf $(VENV) site build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
	@echo "Clean; runs/ is yours and was kept."
