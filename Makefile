PYTHON ?= python3
BIN := .venv/bin
# two processes of one thread: threads of one would spin in the way of the other
WORKERS := OMP_NUM_THREADS=1

.PHONY: demo lint test test-full format clean

demo: .venv/installed
	$(BIN)/kvruntime demo --out demo

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(WORKERS) $(BIN)/python -m pytest -m "not full" -n 2

test-full: lint
	$(WORKERS) $(BIN)/python -m pytest -m "" -n 2

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first: a range would let pip choose its newest build with 5 GB of CUDA
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'Python 3.11 or newer is needed'"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,xformers]'
	touch $@

clean:
	rm -rf .venv demo mutants .hypothesis .mypy_cache .ruff_cache .pytest_cache
