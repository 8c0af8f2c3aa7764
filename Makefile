# Two commands set everything up on a fresh machine: `make quickstart` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TESTS ?= tests
WORKERS ?= 2

.PHONY: help quickstart test check lint types tests docs docs-check clean

help:
	@echo "make quickstart  install, fetch the default model, fine-tune it, show what it learned"
	@echo "make test        install, then every check: format, lint, types, generated files, tests"
	@echo "make check       the checks alone, without installing"
	@echo "make docs        write the generated pages and tables again"

quickstart: $(VENV)/.run
	$(BIN)/adapterlab quickstart --overwrite

test: $(VENV)/.dev
	@$(MAKE) --no-print-directory check

check: lint types docs-check tests

lint:
	$(BIN)/ruff format --check src tests scripts benchmarks
	$(BIN)/ruff check src tests scripts benchmarks

types:
	$(BIN)/mypy

# One process a core; threads inside each would only get in each other's way.
tests:
	$(BIN)/adapterlab pull smollm2-135m
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(TESTS)

docs:
	$(BIN)/python scripts/generate.py

docs-check:
	$(BIN)/python scripts/generate.py --check

# The stamps make a second call instant; a changed pyproject.toml installs again.
$(VENV)/.run: pyproject.toml scripts/install.sh
	PYTHON=$(PYTHON) sh scripts/install.sh $(VENV) quickstart
	@touch $@

$(VENV)/.dev: pyproject.toml scripts/install.sh
	PYTHON=$(PYTHON) sh scripts/install.sh $(VENV) quickstart,dev
	@touch $@ $(VENV)/.run

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
