# make demo   what cvmcore is for, on the shipped sample        make test    the tests
# make lint   ruff                                              make types   mypy --strict
# make bench  what the model itself costs, beside floors        make bench-check   that nothing got slower than recorded
# make docs   pages of the API, from its docstrings, in build/docs
# make bench-record    record the ratios that bench-check compares with
# make check B=tdx    the conformance suite on a backend       make mutants    that the suite catches wrong backends
# Everything runs in .venv, which `make setup` makes; only Python >= 3.11 with venv and pip is needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --no-input --disable-pip-version-check install --constraint constraints.txt
PLUGINS := plugins/sev plugins/tdx plugins/pkvm
STAMP := $(VENV)/.installed

MEASURED := swprot,sev,snp,tdx,pkvm
RECORDED := tests/bench.json
DOCUMENTED := $(addprefix cvmcore.,hookspecs backend types pages effects memory errors cost events observers plugins \
	guest host uapi workloads runner study hwscript measured sched testing) cvmcore_sev.hw cvmcore_tdx.hw cvmcore_pkvm.hw

.PHONY: setup demo test lint types bench bench-check bench-record docs check mutants clean

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

bench: setup
	$(BIN)/cvm bench --backends $(MEASURED)

bench-check: setup
	$(BIN)/cvm bench --backends $(MEASURED) --quick --check $(RECORDED)

bench-record: setup
	$(BIN)/cvm bench --backends $(MEASURED) --quick --record $(RECORDED)

docs: setup
	$(BIN)/python -m pdoc --output-directory build/docs $(DOCUMENTED)

check: setup
	$(BIN)/cvm check $(B)

# TENTH=-1: today's tenth of them.
mutants: setup
	$(BIN)/python tests/mutants/run.py $(MUTANTS) $(if $(TENTH),--tenth $(TENTH))

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage* build dist
	find . -name __pycache__ -prune -exec rm -rf {} +
