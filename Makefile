# `make help` lists the targets. Each sets up what it needs in a virtual environment of this checkout.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

bin := $(VENV)/bin
python := $(bin)/python
in_parallel := --numprocesses 2 --dist loadfile --no-loadscope-reorder
essential := tests/test_rooms.py tests/test_results.py tests/_support tests/_normalize tests/_models \
  tests/_layer/test_contract.py tests/_layer/test_laws.py tests/_shipping/test_convert.py \
  tests/_shipping/fold/test_fold.py
pip_install := $(python) -m pip install --quiet --no-input --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo "Variables: PYTHON=python3.12 makes the environment with that Python, VENV=DIR puts it elsewhere."

.PHONY: test
test: lint types ## lint, check types, run the tests; on CI count coverage too
	$(python) -m pytest -m "not slow" $(if $(CI),--cov) $(in_parallel) $(PYTEST_ARGS)

.PHONY: coverage
coverage: $(VENV)/ready ## run the tests and print the branches that they miss: a third longer
	$(python) -m pytest -m "not slow" --cov $(in_parallel) $(PYTEST_ARGS)

# What breaks most often when something else changes: the choice of kernels, the layer's contract, the algebra
# of folding, models of every kind, and the rooms.
.PHONY: check
check: lint types ## the inner loop, under a minute: lint, check types, and run the tests that matter most
	$(python) -m pytest --quiet $(in_parallel) $(essential) $(PYTEST_ARGS)

.PHONY: test-slow
test-slow: $(VENV)/ready ## run the tests that take longest: workers that are killed, three workers, a larger data set
	$(python) -m pytest -m slow $(PYTEST_ARGS)

.PHONY: test-models
test-models: ## run every tool on models of other packages, in an environment of their own: long
	$(MAKE) VENV=.venv-models .venv-models/ready-models
	.venv-models/bin/python -m benchmarks.packages $(MODELS_ARGS)

.PHONY: fuzz
fuzz: $(VENV)/ready ## 10,000 random layers and batches against the oracle and Keras: half an hour
	$(python) tests/harness/fuzz.py $(FUZZ_ARGS)

.PHONY: test-keras
test-keras: $(VENV)/ready ## Keras's own tests of models with batch normalization, with tfbn's layer: some minutes
	$(python) tests/harness/keras_suite.py

.PHONY: demo
demo: $(VENV)/ready ## train on handwritten digits and export the model
	$(python) examples/train_digits.py

.PHONY: lectures
lectures: $(VENV)/ready ## what the lectures claim, as experiments with pictures: about 10 minutes
	$(python) -m examples.lectures

.PHONY: bench
bench: $(VENV)/ready-bench ## measure against Keras and PyTorch
	$(python) -m benchmarks

.PHONY: docs
docs: $(VENV)/ready-docs ## build the documentation into docs/_build/html: runs the guides, some minutes
	$(python) -m sphinx --builder html --fail-on-warning --keep-going docs docs/_build/html

.PHONY: dist
dist: $(VENV)/ready-dist ## build sdist and wheel into dist/, check them, and try the wheel in an empty environment
	rm -rf build dist
	$(python) -m build
	$(python) -m twine check --strict dist/*
	$(python) -m venv build/empty
	build/empty/bin/python -m pip install --quiet --no-input --disable-pip-version-check dist/*.whl
	cd build/empty && bin/python -I ../../tests/harness/smoke.py
	rm -rf build

.PHONY: lint
lint: $(VENV)/ready ## check style and formatting
	$(python) -m ruff check
	$(python) -m ruff format --check

.PHONY: types
types: $(VENV)/ready ## check types
	$(python) -m mypy

.PHONY: format
format: $(VENV)/ready ## put the code into the style that lint asks for
	$(python) -m ruff check --fix
	$(python) -m ruff format

# pip reads PIP_CONSTRAINT, and make exports a variable that its command line sets.
.PHONY: test-oldest
test-oldest: ## run the tests with the oldest TensorFlow and Keras that we promise
	$(MAKE) VENV=.venv-oldest PIP_CONSTRAINT=tests/oldest.txt .venv-oldest/ready
	.venv-oldest/bin/python -m pytest -m "not slow" $(in_parallel) $(PYTEST_ARGS)

.PHONY: clean
clean: ## remove what the tools and the build left behind
	rm -rf .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist docs/_build docs/api htmlcov
	find tfbn tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean ## clean, and remove the virtual environments
	rm -rf .venv .venv-models .venv-oldest

# Installing is slow: a stamp remembers what pyproject.toml it was done for.
$(VENV)/ready: pyproject.toml | $(python)
	@echo "Installing tfbn and its tools into $(VENV): some minutes, once."
	$(pip_install) --editable '.[dev]'
	@touch $@

.venv-oldest/ready: tests/oldest.txt

$(VENV)/ready-bench: $(VENV)/ready
	@echo "Installing what the benchmarks compare with into $(VENV)."
	$(pip_install) --editable '.[bench]'
	@touch $@

$(VENV)/ready-models: benchmarks/packages.txt $(VENV)/ready
	@echo "Installing the packages into $(VENV)."
	$(pip_install) --requirement benchmarks/packages.txt
	@touch $@

$(VENV)/ready-docs: $(VENV)/ready
	@echo "Installing what builds the documentation into $(VENV)."
	$(pip_install) --editable '.[docs]'
	@touch $@

$(VENV)/ready-dist: $(VENV)/ready
	@echo "Installing what builds and checks the package into $(VENV)."
	$(pip_install) --editable '.[dist]'
	@touch $@

$(python):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "tfbn needs Python 3.11 to 3.13. Received: $(PYTHON), $$($(PYTHON) --version 2>&1)." \
	    "Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
