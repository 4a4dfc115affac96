# Two commands do everything on a fresh machine: `make study` and `make test`. Each makes .venv where there is none.
# `make more` is the second required part of the tests (docs, analyses, browser, kernels), `make long` the whole proof.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: study test more long check clean

study: $(VENV)/.package
	$(BIN)/probekit study -o build/study

test: $(VENV)/.tests
	$(BIN)/python -m pytest

more: $(VENV)/.tests
	$(BIN)/python -m pytest -m "second and not long"

long: $(VENV)/.tests
	$(INSTALL) --editable '.[test,docs]'
	$(BIN)/python -m pytest -m long -n 0

check: $(VENV)/.checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/deptry . analyses
	$(BIN)/bandit --quiet --recursive probekit --configfile pyproject.toml

clean:
	rm -rf build $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.package: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable .
	touch $@

$(VENV)/.tests: $(VENV)/.package
	$(INSTALL) --editable '.[test]'
	touch $@

$(VENV)/.checks: $(VENV)/.package
	$(INSTALL) --editable '.[test,check,train]'
	touch $@
