# Every target makes its own virtual environment first; VENV, PYTHON, PYTEST_ARGS and BENCH_ARGS can be set on the command line.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PYTEST_ARGS ?=
BENCH_ARGS ?=
# OpenMP threads that wait for each other spin; one thread a process, two processes, is the fast way to run the tests.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: quickstart test test-gpu check bench clean

quickstart: $(VENV)/.ready
	$(BIN)/python examples/quickstart.py

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

test-gpu: $(VENV)/.ready
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(VENV)/.ready
	$(BIN)/python -m benchmarks.run $(BENCH_ARGS)

$(VENV)/.ready: pyproject.toml constraints/cpu.txt
	PYTHON=$(PYTHON) sh scripts/setup.sh $(VENV)
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info outputs
