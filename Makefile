# The one list of commands. `make help` prints it.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:cacheprovider -n 2 \
	--jaxtyping-packages=ssat_probe.measures,ssat_probe.models,ssat_probe.decoders,ssat_probe.objectives,ssat_probe.patches,ssat_probe.cvt_blocks,ssat_probe.patch_encoder,ssat_probe.losses,beartype.beartype

.DEFAULT_GOAL := help
.PHONY: help reproduce test test-slow benchmark-landscape benchmark-curvature benchmark-probes benchmark-training format wheel clean

help: ## print this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 22

reproduce: .venv/installed ## train, probe and compare: figures/mechanisms/report.html
	$(BIN)/ssat-probe reproduce

test: .venv/installed-test ## format, lint, import layers, types, tests, doctests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy
	$(PYTEST)

test-slow: .venv/installed-test ## the tests that take minutes
	$(PYTEST) -m slow

format: .venv/installed-test ## rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

benchmark-landscape: .venv/installed ## time per point of a loss surface, against a plain loop
	$(BIN)/python analyses/benchmarks/landscape.py

benchmark-probes: .venv/installed ## time and memory of the probes, against the plain forward pass
	$(BIN)/python analyses/benchmarks/probes.py

benchmark-training: .venv/installed ## images per second of a training step, against the same written plainly
	$(BIN)/python analyses/benchmarks/training.py

benchmark-curvature: .venv/installed ## Hessian products, eigenvalues, exact spectra, negative part: against peers
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[benchmark]'
	$(BIN)/python analyses/benchmarks/curvature.py

wheel: .venv/installed-test ## build dist/*.whl
	$(BIN)/python -m build --wheel

clean: ## remove the environment and caches
	rm -rf .venv .mypy_cache .ruff_cache .hypothesis dist build

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "ssat-probe needs Python 3.11 or newer, got $$($(PYTHON) --version); run: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv/installed-test: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch .venv/installed $@
