# All anyone needs: python3 and make. Everything goes into .venv inside the checkout.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Compilers for accelerators go into environments of their own: with them installed jax
# looks for the accelerator at every start.
TPU_VENV := .venv-tpu
CUDA_VENV := .venv-cuda

.PHONY: help quickstart test torture lint format compile-tpu compile-cuda roofline clean

help: ## list what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s%s\n", $$1, $$2 }' Makefile

quickstart: $(VENV)/installed ## run the main job: cached against recomputed, 2 minutes
	$(BIN)/cachedattn run configs/quickstart.gin --output_dir runs/quickstart

test: $(VENV)/installed-dev ## run the tests
	$(BIN)/python -m pytest -n 2

torture: $(VENV)/installed ## kill -9 and faults under a running workload, 5 minutes
	$(BIN)/cachedattn run configs/torture.gin --output_dir runs/torture $(ARGS)

lint: $(VENV)/installed-dev ## run ruff and pyright, as CI does
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

compile-tpu: $(TPU_VENV)/installed ## compile every program for TPUs that are not there, 5 minutes
	$(TPU_VENV)/bin/python -m experiments.ahead_of_time tpu $(ARGS)

compile-cuda: $(CUDA_VENV)/installed ## the same for one H200, 20 minutes; installs 4.4 GB
	$(CUDA_VENV)/bin/python -m experiments.ahead_of_time cuda $(ARGS)

roofline: $(TPU_VENV)/installed ## bytes and operations of every program against the least
	$(TPU_VENV)/bin/python -m experiments.roofline $(ARGS)

format: $(VENV)/installed-dev ## let ruff format and sort
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and the caches; runs stay
	rm -rf $(VENV) $(TPU_VENV) $(CUDA_VENV) .cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 ..."; \
	  exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) has no venv module; install it (Debian: apt install python3-venv)"; \
	  exit 1; }

# A stamp that is newer than pyproject.toml means that there is nothing to install.
$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	@echo "Installing into $(VENV), once; this takes a minute or two."
	$(PIP) --editable .
	@touch $@

$(VENV)/installed-dev: pyproject.toml | $(VENV)/bin/python
	@echo "Installing into $(VENV), once; this takes a minute or two."
	$(PIP) --editable '.[dev]'
	@touch $(VENV)/installed $@

$(TPU_VENV)/installed: pyproject.toml
	@echo "Installing the TPU compiler into $(TPU_VENV), once: 0.6 GB."
	@$(PYTHON) -m venv $(TPU_VENV)
	$(TPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[tpu]'
	@touch $@

$(CUDA_VENV)/installed: pyproject.toml
	@echo "Installing CUDA's compilers into $(CUDA_VENV), once: 4.4 GB."
	@$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[cuda]'
	@touch $@
