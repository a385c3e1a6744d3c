# SPDX-License-Identifier: Apache-2.0
# make demo: quantize a real model for four accelerators.  make test: run the tests.  Both set up .venv first.

PYTHON ?= python3
VENV ?= .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
READY := $(VENV)/.ready

.PHONY: demo test test-slow lint types bench bench-ptq bench-qat bench-integer clean

demo: $(READY)
	$(BIN)/python -m examples.demo

# One process per processor, each with one thread (tests/conftest.py).
test: $(READY)
	$(BIN)/python -m pytest -q -m "not slow" -n auto --dist worksteal

test-slow: $(READY)
	$(BIN)/python -m pytest -q -m slow -n auto --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m bench.cifar

bench-integer: $(READY)
	$(BIN)/python -m bench.integer

bench-ptq: $(READY)
	$(BIN)/python -m bench.ptq

bench-qat: $(READY)
	$(BIN)/python -m bench.qat

# Installed again when the dependencies or the entry points change.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("qhw needs Python 3.11 or later; %s is %s. Try: make PYTHON=python3.11" % (sys.executable, sys.version.split()[0]) if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[examples,bench,test,dev]"
	@$(BIN)/python -c 'import pathlib; pathlib.Path("$(READY)").touch()'

clean:
	rm -rf $(VENV) build out .mypy_cache .pytest_cache .ruff_cache
