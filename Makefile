PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --no-input --disable-pip-version-check -c constraints.txt
# two processes of one thread: threads of one would spin in the way of the other
WORKERS := OMP_NUM_THREADS=1

.PHONY: help demo test test-full lint format docs dist clean
.DEFAULT_GOAL := help

help: ## say what there is to make
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

demo: .venv/runs ## draw with the bundled model, write demo/
	@GOMP_SPINCOUNT=3000 $(BIN)/kvruntime demo --out demo

test: lint ## what CI runs
	$(WORKERS) $(BIN)/python -m pytest -m "not full" -n 2 --dist worksteal

test-full: lint ## the slow tests as well
	$(WORKERS) $(BIN)/python -m pytest -m "" -n 2 --dist worksteal

lint: .venv/installed ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed ## ruff's fixes and layout
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/installed ## the site, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q -d site

dist: .venv/runs ## wheel and sdist, checked, into dist/
	@$(PIP) -e '.[release]'
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

# torch first: a range would let pip choose its newest build with 5 GB of CUDA
.venv/runs: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'Python 3.11 or newer is needed'"
	@echo "installing into .venv, once: about 200 MB"
	@$(PYTHON) -m venv .venv
	@$(PIP) torch==2.13.0
	@$(PIP) -e '.[cli]'
	@touch $@

.venv/installed: .venv/runs
	@echo "installing what tests need"
	@$(PIP) -e '.[dev,xformers]'
	@touch $@

clean: ## remove what was made
	rm -rf .venv demo site dist mutants .hypothesis .mypy_cache .ruff_cache .pytest_cache
