# All anyone needs: python3 and make. Everything goes into .venv inside the checkout.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help quickstart test lint format clean

help: ## what there is to make
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/'

quickstart: $(VENV)/installed ## run the main job: cached against recomputed, 2 minutes
	$(BIN)/cachedattn run configs/quickstart.gin --output_dir runs/quickstart

test: $(VENV)/installed-dev ## run the tests
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/installed-dev ## ruff and pyright, as CI runs them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/installed-dev ## let ruff format and sort
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment, the caches and the runs
	rm -rf $(VENV) .cache runs

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "python3 cannot make virtual environments; install its venv package"; \
	    rm -rf $(VENV); exit 1; }

# A stamp newer than pyproject.toml means: nothing to install.
$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(VENV)/installed
