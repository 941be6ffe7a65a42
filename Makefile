# `make demo`: the whole job on the embedded digits. `make test`: all tests. `make lint`: style and types.
# `make test-wild`: nets that people own, pruned for real, into docs/nets.md. It takes hours, and goes on where it was.
# `make test-portable`: what compares numbers, under other instruction sets, threads and without kernels.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_DIR ?= runs/quickstart

PORTABLE := portable-default portable-avx2 portable-onednn portable-1-thread portable-2-threads portable-plain
PORTABLE_TESTS ?= tests prune_dn
WORKERS ?= auto

.PHONY: demo test test-portable $(PORTABLE) test-nightly test-wild lint format clean

demo: $(VENV)/.installed
	$(BIN)/prune-dn run recipes/quickstart.yaml --output-dir $(DEMO_DIR) --overwrite
	@if [ -n "$$DISPLAY$$WAYLAND_DISPLAY" ] && command -v xdg-open >/dev/null; then xdg-open $(DEMO_DIR)/report.html; fi

# OpenVINO's tests in processes of their own: a process that had run a thousand others before them ended by a segmentation fault.
OPENVINO_TESTS := tests/deploy tests/cli/test_deploying.py

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(OPENVINO_TESTS)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(addprefix --ignore=,$(OPENVINO_TESTS))

test-portable:
	$(MAKE) --keep-going $(PORTABLE)

portable-default: export ATEN_CPU_CAPABILITY = default
portable-avx2: export ATEN_CPU_CAPABILITY = avx2
portable-onednn: export ONEDNN_MAX_CPU_ISA = AVX2
portable-1-thread: export OMP_NUM_THREADS = 1
portable-2-threads: export OMP_NUM_THREADS = 2
portable-2-threads: export OMP_WAIT_POLICY = passive
portable-2-threads: WORKERS = 1
portable-plain: export PRUNE_DN_KERNELS = 0
$(PORTABLE): $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -p no:cacheprovider -m numbers $(PORTABLE_TESTS)

test-nightly: $(VENV)/.installed
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest tests/pruning/test_exactness.py tests/models tests/checkpoints/test_hostile_files.py

test-wild: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[wild]'
	$(BIN)/python tools/wild.py --docs docs/nets.md

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
