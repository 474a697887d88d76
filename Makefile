# All anyone needs: python3 and make. Everything goes into .venv inside the checkout.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help quickstart test lint format clean

help: ## list what there is to make
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s%s\n", $$1, $$2 }' Makefile

quickstart: $(VENV)/installed ## run the main job: cached against recomputed, 2 minutes
	$(BIN)/cachedattn run configs/quickstart.gin --output_dir runs/quickstart

test: $(VENV)/installed-dev ## run the tests
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/installed-dev ## run ruff and pyright, as CI does
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/installed-dev ## let ruff format and sort
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and the caches; runs stay
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis

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
