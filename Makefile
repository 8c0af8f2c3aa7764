# Two commands set everything up on a fresh machine: `make quickstart` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TESTS ?= tests
WORKERS ?= 2

.PHONY: help quickstart test check quick lint types tests docs docs-check compat lock clean

help:
	@echo "make quickstart  install, fetch the default model, fine-tune it, show what it learned"
	@echo "make test        install, then every check: format, lint, types, generated files, tests"
	@echo "make check       the checks alone, without installing"
	@echo "make quick       format, lint and one case of each test: a few minutes, for daily work"
	@echo "make docs        write the generated pages and tables again"
	@echo "make compat      run the tests that meet other libraries on the oldest and newest versions allowed"
	@echo "make lock        write down the versions in .venv as the tested ones"

quickstart: $(VENV)/.run
	$(BIN)/adapterlab quickstart --overwrite

test: $(VENV)/.dev
	@$(MAKE) --no-print-directory check

# What needs one core each goes on at a time; the tests fill all of them.
check:
	@$(MAKE) --no-print-directory -j $(WORKERS) lint types docs-check
	@$(MAKE) --no-print-directory tests

# Uncached: a kept verdict on the order of imports outlives a moved module.
lint:
	$(BIN)/ruff format --check src tests scripts benchmarks
	$(BIN)/ruff check --no-cache src tests scripts benchmarks

types:
	$(BIN)/mypy

# One process a core; threads inside each would only get in each other's way.
tests:
	$(BIN)/adapterlab pull smollm2-135m
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(TESTS)

quick: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --quick $(TESTS)

docs:
	$(BIN)/python scripts/generate.py

docs-check:
	$(BIN)/python scripts/generate.py --check

compat:
	$(BIN)/python scripts/compat.py

lock:
	$(BIN)/python scripts/compat.py --lock

# The stamps make a second call instant; changed requirements install again.
$(VENV)/.run: pyproject.toml requirements/tested.txt scripts/install.sh
	PYTHON=$(PYTHON) sh scripts/install.sh $(VENV) quickstart
	@touch $@

$(VENV)/.dev: pyproject.toml requirements/tested.txt scripts/install.sh
	PYTHON=$(PYTHON) sh scripts/install.sh $(VENV) quickstart,dev
	@touch $@ $(VENV)/.run

clean:
	rm -rf $(VENV) .compat build dist .pytest_cache .mypy_cache .ruff_cache
