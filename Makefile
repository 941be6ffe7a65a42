# `make demo`: the whole job on the embedded digits. `make test`: all tests. `make lint`: style and types.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_DIR ?= runs/quickstart

.PHONY: demo test test-nightly lint format clean

demo: $(VENV)/.installed
	$(BIN)/prune-dn run recipes/quickstart.yaml --output-dir $(DEMO_DIR) --overwrite

test: $(VENV)/.installed
	$(BIN)/python -m pytest

test-nightly: $(VENV)/.installed
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest tests/pruning/test_exactness.py tests/models tests/test_hostile_files.py

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/.installed: setup.cfg setup.py pyproject.toml prune_dn/models/fused.c
	$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info < (3, 14), f"prune_dn needs Python 3.10 to 3.13, this is {sys.version}: make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
