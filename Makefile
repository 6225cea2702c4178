# `make demo` and `make test` each set up an environment of their own under .venv* and touch no other.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-slow lint types fast test-oldest test-newest

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0 -c constraints.txt
	$(BIN)/pip install --quiet -e '.[dev]' -c constraints.txt
	touch $@

demo: $(VENV)/.ready
	$(BIN)/fxopt demo

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow'

test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 -m slow

fast: $(VENV)/.ready
	$(BIN)/python -m pytest -m 'not slow'

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(MAKE) --no-print-directory types
	$(BIN)/python -m pytest tests/test_house.py

# passes/ and codegen/ are installed as fxopt.passes and fxopt.codegen; a type checker needs to see them there.
types: $(VENV)/.ready
	rm -rf build/types && mkdir -p build/types/fxopt
	ln -s $(CURDIR)/fxopt/* $(CURDIR)/passes $(CURDIR)/codegen build/types/fxopt/
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p fxopt

# The oldest and the newest torch that fxopt supports, each in an environment of its own. The interpreter of Triton 3.6,
# which comes with the oldest, reads numbers in a way that numpy 2.4 no longer allows.
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet torch==2.11.0 transformers==5.17.0 'numpy<2.4'
	.venv-oldest/bin/pip install --quiet -e '.[dev]'
	.venv-oldest/bin/python -m pytest

test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet torch==2.15.0 transformers==5.23.0
	.venv-newest/bin/pip install --quiet -e '.[dev]'
	.venv-newest/bin/python -m pytest
