# Everything starts from Python 3.11 (or newer) and make: each target builds the environment it needs in .venv first.
#
#   make TORCH='torch==2.13.0+cu130 --index-url URL' ...   another build of PyTorch (whatever pip takes)
#   make PYTHON=/path/to/python ...                        another Python
#   make quickstart ARGS='--seeds 3'                       more arguments for the command behind a target

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH ?= torch==2.13.0
VENV ?= .venv
ARGS ?=
ONLY ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
TESTS := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help quickstart test test-long bench check format clean

help: ## what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

quickstart: $(VENV)/.installed ## install, run the first whole recipe, print its table and write its report
	$(BIN)/tutelage run quickstart $(ARGS)

test: $(VENV)/.developed ## install, run the tests but the long ones
	$(TESTS) -m 'not long and not gpu' $(ARGS)

test-long: $(VENV)/.developed ## what is too slow for every run
	$(TESTS) -m 'long and not gpu' $(ARGS)

bench: $(VENV)/.developed ## measure against TRL and transformers: all of it, or make bench ONLY=rollout; writes bench/RESULTS.md
	$(BIN)/python -m bench $(ONLY) $(ARGS)

check: $(VENV)/.developed ## format, lint and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: $(VENV)/.developed ## put the code into format
	$(BIN)/ruff check --fix --exit-zero --quiet
	$(BIN)/ruff format

clean: ## remove the environment and caches, never the store
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info

# --- the environment ---------------------------------------------------------------------------------------------------
# PyTorch first and alone, so that nothing else decides which build of it comes. A TORCH given by hand that is not the one
# installed is installed again, and a changed pyproject.toml or compiled step too.

BUILT := pyproject.toml src/tutelage/model/decode.c

ifneq ($(origin TORCH),file)
ifneq ($(strip $(TORCH)),$(strip $(shell cat $(VENV)/.torch 2>/dev/null)))
.PHONY: $(VENV)/.torch
endif
endif

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "no python3.11 or python3 found; give one: make PYTHON=/path/to/python ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is older than Python 3.11; give another: make PYTHON=/path/to/python ..." >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

$(VENV)/.torch: | $(VENV)/bin/python
	$(PIP) $(TORCH)
	@echo '$(strip $(TORCH))' > $@

$(VENV)/.installed: $(VENV)/.torch $(BUILT)
	$(PIP) --editable .
	@touch $@

$(VENV)/.developed: $(VENV)/.torch $(BUILT)
	$(PIP) --editable '.[dev]'
	@touch $(VENV)/.installed $@
