# Two commands on a fresh machine with Python 3.11 or later: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test slow lint format clean

demo: .venv/demo-installed  ## the main job, offline, on drawn scenes: 4 minutes on 2 cores
	$(BIN)/python demos/quickstart.py

test: lint  ## style, types and the default tests: about 10 minutes on 2 cores
	$(BIN)/pytest

slow: .venv/test-installed  ## the full counts and longer trainings
	$(BIN)/pytest -m slow

lint: .venv/test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/test-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/bin/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, this is " + sys.version.split()[0] + "; give one with PYTHON=...")'
	$(PYTHON) -m venv .venv

.venv/demo-installed: pyproject.toml constraints.txt | .venv/bin/pip
	@echo "installing into .venv (PyTorch is large: minutes, about 6 GB)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo]'
	@touch $@

.venv/test-installed: pyproject.toml constraints.txt | .venv/bin/pip
	@echo "installing into .venv (PyTorch is large: minutes, about 6 GB)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ .venv/demo-installed

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache *.egg-info
