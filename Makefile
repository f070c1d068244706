# Every target works on a fresh clone: python3 (3.10 or newer) and make; g++ lets MLX compile on the CPU.
# Options go in ARGS: make demo ARGS="--dtype bfloat16", make test ARGS="-k packaging".
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: help demo test soak bench distributed lint
help:
	@echo "make demo   train a classifier, compare optimizers, draw a picture to out/"
	@echo "make test   run all tests"
	@echo "make soak   20,000 steps on a large sparse table, 100,000 in few bits"
	@echo "make bench  measure time and memory, write the report to out/"
	@echo "make distributed  train a recommender in two processes, draw a picture to out/"
	@echo "make lint   ruff and pyright"

demo: $(VENV)/.examples
	$(BIN)/python examples/digits.py $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadgroup $(ARGS)

# The long runs of tests that make test does for fewer steps.
soak: $(VENV)/.dev
	SOAK_STEPS=20000 $(BIN)/python -m pytest tests/test_rows_soak.py $(ARGS)
	STALL_STEPS=100000 $(BIN)/python -m pytest tests/test_stall_soak.py $(ARGS)

bench: $(VENV)/.benchmarks
	$(BIN)/python benchmarks/run.py $(ARGS)

distributed: $(VENV)/.examples
	$(BIN)/python examples/distributed.py $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

# One stamp per extra, so that the demo need not wait for the linters. The cpu extra adds nothing on macOS.
$(VENV)/.examples $(VENV)/.benchmarks $(VENV)/.dev: $(VENV)/.%: pyproject.toml | $(VENV)/.made
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[cpu,$*]'
	@touch $@

# From 22.3 on pip installs into another environment (--python), which tests/test_packaging.py uses.
$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "'$(PYTHON)' not found: install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "Python 3.10 or newer is needed, '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Name another: make PYTHON=python3.12" >&2; \
	  exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "'$(PYTHON) -m venv' failed; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'pip>=22.3'
	@touch $@
