# Every target sets up what it needs first: `make env` makes or repairs .venv, and takes about half a second
# when there is nothing to do. Another interpreter: make PYTHON=/path/to/python3.12 ...
PYTHON ?= python3
VENV := .venv/bin
TEST_FOLDERS = $(wildcard tests/unit tests/distributed tests/integration tests/e2e)
SOURCES := megatron_ztrl sandbox tools examples tests benchmarks setup.py
ARGS ?=
# Processes that run tests; what they share, and what runs alone, is in tests/conftest.py.
TEST_PROCESSES ?= 2
SIDE_BY_SIDE = -n $(TEST_PROCESSES) --dist loadgroup --no-loadscope-reorder

# Many processes share few cores here; one intra-op thread each is fastest. The user's own value wins.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help env quickstart test test-unit test-all lint format type bench parity gpu-setup clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

env:  ## make or repair the virtual environment .venv (CPU unless `make gpu-setup` made it)
	@$(PYTHON) tools/make_env.py

quickstart: env  ## train a tiny model end to end on this machine; options in ARGS="..."
	@$(VENV)/python examples/quickstart/run.py $(ARGS)

test test-unit test-all: export HF_HUB_OFFLINE = 1

test: env  ## unit, distributed, integration and end-to-end tests, except those marked slow
	@$(VENV)/python -m pytest $(TEST_FOLDERS) $(SIDE_BY_SIDE) -m "not slow and not gpu" $(ARGS)

test-unit: env  ## unit tests only
	@$(VENV)/python -m pytest tests/unit -m "not slow" $(ARGS)

test-all: env  ## all tests that this machine can run, slow ones too
	@$(VENV)/python -m pytest tests $(ARGS)

lint: env  ## ruff, formatting, import layers
	@$(VENV)/ruff check $(wildcard $(SOURCES))
	@$(VENV)/ruff format --check $(wildcard $(SOURCES))
	@$(VENV)/lint-imports

format: env  ## rewrite the sources as ruff wants them
	@$(VENV)/ruff check --fix $(wildcard $(SOURCES))
	@$(VENV)/ruff format $(wildcard $(SOURCES))

type: env  ## mypy on the two packages
	@$(VENV)/mypy

bench: env  ## every program in benchmarks/, one after the other: hours; trl_comparison wants an environment of its own
	@for program in $(wildcard benchmarks/[a-z]*.py); do \
		echo "== $$program"; $(VENV)/python $$program $(ARGS) || exit 1; \
	done

parity: env  ## compare with transformers under every layout, up to 8 processes, and write docs/parity.md
	@$(VENV)/python benchmarks/parity.py $(ARGS)

gpu-setup:  ## the virtual environment for NVIDIA GPUs (needs the CUDA 13 toolkit; see Dockerfile)
	@$(PYTHON) tools/make_env.py --profile gpu

clean:  ## delete caches and build output; the environment and runs/ stay
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	@find $(wildcard $(SOURCES)) -name __pycache__ -type d -prune -exec rm -rf {} +
