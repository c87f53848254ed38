# make help lists the targets. The environment is made on first use, in .venv, with the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# torch first: what else depends on it then takes the build that is already there.
$(VENV)/.installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) --editable '.[test,dev]'
	@touch $@

install: $(VENV)/.installed  ## create the environment and install

quickstart: $(VENV)/.installed  ## the whole chain on scanned digits, offline, in minutes
	$(BIN)/python -m vptsp.examples.quickstart

test: $(VENV)/.installed  ## run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# The same tests as among the others, with a hundred times as many inputs, others each time.
fuzz: $(VENV)/.installed  ## try damaged inputs, for an hour or so
	FUZZ_FACTOR=100 $(BIN)/python -m pytest -n 2 -m fuzz $(ARGS)
test-docs: $(VENV)/.installed  ## run the commands of README and docs as they are written
	$(BIN)/python -m pytest -m slow tests/test_documented_commands.py

# A short selection with the lowest versions that setup.cfg claims, and with the newest that pip finds, each in an
# environment of its own. What a release of tomorrow breaks is no fault of a commit, so CI runs the first one alone;
# `make test-newest PYTHON=python3.13` also tries another Python.
LOWEST := .venv-lowest
NEWEST := .venv-newest
SELECTION := tests/test_modeling.py tests/test_saved_format.py tests/test_families.py tests/test_fast_path.py \
	tests/training/test_trainer.py tests/search/test_index.py tests/search/test_store.py tests/eval/test_metrics.py \
	tests/data_scripts/test_folder.py

$(LOWEST)/.installed: setup.cfg constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt torch
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt \
		--editable '.[lora]' pytest pytest-xdist
	@touch $@

test-lowest: $(LOWEST)/.installed  ## a short selection of the tests, with the lowest versions claimed
	$(LOWEST)/bin/python -m pytest -n 2 --dist loadfile $(SELECTION)

test-newest:  ## the same selection, with the newest versions there are
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check torch
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[lora]' pytest pytest-xdist
	$(NEWEST)/bin/python -m pip list --format freeze | grep -E '^(torch|transformers|datasets|accelerate|numpy)=='
	$(NEWEST)/bin/python -m pytest -n 2 --dist loadfile $(SELECTION)

style: $(VENV)/.installed  ## format and fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

quality: $(VENV)/.installed  ## check format and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# What an earlier build left in build/ would go into the wheel too.
wheel: $(VENV)/.installed  ## build the package, in dist/
	rm -rf build *.egg-info
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

clean:  ## remove what builds and runs leave (not the environment)
	rm -rf build dist *.egg-info runs .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

.PHONY: help install quickstart test test-docs fuzz test-lowest test-newest style quality wheel clean
