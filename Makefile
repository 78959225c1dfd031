# make demo   what cvmcore is for, on the shipped sample        make test    the tests
# make lint   ruff                                              make types   mypy --strict
# Everything runs in .venv, which `make setup` makes; only Python >= 3.11 with venv and pip is needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --no-input --disable-pip-version-check install --constraint constraints.txt
PLUGINS := plugins/sev plugins/tdx plugins/pkvm
STAMP := $(VENV)/.installed

.PHONY: setup demo test lint types clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(PLUGINS:=/pyproject.toml)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) hatchling editables
	$(PIP) --no-build-isolation --editable '.[dev]' $(PLUGINS:%=--editable %)
	@touch $@

demo: setup
	$(BIN)/cvm compare trace --backends swprot,sev,snp,tdx,pkvm

test: setup
	$(BIN)/python -m pytest --numprocesses auto $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage* build dist
	find . -name __pycache__ -prune -exec rm -rf {} +
