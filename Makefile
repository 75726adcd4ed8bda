# `make demo` and `make test` set everything up by themselves; all they need is Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := $(VENV)/.ready

.PHONY: help demo test test-slow test-all coverage lint type imports wheel test-wheel bench detectors clean
help:  ## say what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ \t/' | expand -t 14

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing: install Python 3.11 or newer, or name one: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) -V). Name another: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { echo "$(PYTHON) has no venv module: install it (Debian: apt install python3-venv)." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt torch==2.13.0
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)  ## the main job on four real hospitals; writes demo-output/report.html
	$(BIN)/sentinel demo --out demo-output

test: $(READY)  ## the tests
	$(BIN)/python -m pytest -m 'not slow'

test-all: $(READY)  ## the tests and the slow ones
	$(BIN)/python -m pytest

test-slow: $(READY)  ## the slow tests alone: the whole demo against its aims
	$(BIN)/python -m pytest -m slow

coverage: $(READY)  ## the tests, with the lines and branches that they do not reach
	$(BIN)/python -m pytest -m 'not slow' --cov --cov-report=term

lint: $(READY)  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(READY)  ## types
	$(BIN)/mypy

imports: $(READY)  ## the floors of the house
	$(BIN)/lint-imports

wheel: $(READY)  ## build the wheel into dist/
	rm -rf dist
	$(BIN)/python -m build --quiet --wheel

# The wheel is installed alone; its dependencies are borrowed from the other environment.
test-wheel: wheel  ## the tests against the built wheel
	rm -rf .venv-wheel
	$(PYTHON) -m venv --without-pip .venv-wheel
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$(.venv-wheel/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
	$(PIP) --python .venv-wheel/bin/python install --quiet --no-deps --force-reinstall dist/*.whl
	SENTINEL_TEST_WHEEL="$$(ls dist/*.whl)" .venv-wheel/bin/python -P -m pytest -m 'not slow'

bench: $(READY)  ## a release beside Flower's and NVFLARE's own code
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt torch==2.13.0
	.venv-bench/bin/python -m pip --disable-pip-version-check install --quiet flwr==1.41.0 nvflare==2.9.0
	.venv-bench/bin/python -m pip --disable-pip-version-check install --quiet -e .
	.venv-bench/bin/python tests/benchmarks/release.py

detectors: $(READY)  ## train the shipped detectors again
	$(BIN)/sentinel detectors train --out detectors

clean:  ## remove what was made
	rm -rf $(VENV) .venv-wheel .venv-bench dist build demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
