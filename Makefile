# Everything runs in .venv, made on first use with the pinned versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := dev

.PHONY: help demo test test-slow check lint types bench notebooks wheel clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

$(STAMP): setup.cfg constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "cannot make a virtual environment: install Python's venv module (Debian: apt install python3-venv)"; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$(EXTRAS)]"
	@touch $(STAMP)

demo: $(STAMP)  ## pretrain, fine-tune and compare on the embedded phantom (minutes on two cores)
	$(BIN)/python -m benchmarks.label_efficiency benchmarks/studies/demo.yaml --output_dir demo_output

test: $(STAMP)  ## the tests
	OMP_NUM_THREADS=1 PYTHONUTF8=1 $(BIN)/python -m pytest -m "not slow" -n 2 --no-loadscope-reorder

test-slow: $(STAMP)  ## the tests that take minutes each
	OMP_NUM_THREADS=1 PYTHONUTF8=1 $(BIN)/python -m pytest -m slow

lint: $(STAMP)  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## types
	$(BIN)/mypy

check: lint types test  ## lint, types and tests

bench: $(STAMP)  ## speed and memory as ratios
	$(BIN)/python -m benchmarks

notebooks: $(STAMP)  ## run every notebook and store its pictures
	$(BIN)/python -m pytest tests/test_notebooks.py -m "slow or not slow"

wheel: $(STAMP)  ## build the wheel into dist/
	$(BIN)/python -m build --wheel

clean:  ## remove what was built, not .venv
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache demo_output
