# Each target makes what it needs. `make demo` and `make test` work in a fresh clone, in any order.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
TORCHREC := 1.9.2
DEMO_OUT ?= runs/demo

.DEFAULT_GOAL := help
.PHONY: help demo test check fmt lint types docs bench bench-parts paper clean slow

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

# Two stamps, so that the demo does not wait for the tests' tools.
$(BIN)/.package: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "steadyrank needs Python 3.11 or newer; give make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(BIN)/.dev: $(BIN)/.package
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps torchrec==$(TORCHREC)
	touch $@

demo: $(BIN)/.package  ## Train on the generated stream and write a report
	$(BIN)/steadyrank demo --out $(DEMO_OUT) --overwrite

test: $(BIN)/.dev  ## Run the tests
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

slow: $(BIN)/.dev  ## Run the slow tests too
	$(BIN)/python -m pytest -q -m "not gpu"

fmt: $(BIN)/.dev  ## Format the code
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format .

lint: $(BIN)/.dev  ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(BIN)/.dev  ## Check types
	$(BIN)/mypy

docs: $(BIN)/.dev  ## Run every example in the docs and docstrings
	$(BIN)/python -m pytest -q --doctest-modules steadyrank tests/test_docs.py

# The peers have an environment of their own, with this package in it, so that all run on the same torch.
$(PEERS)/.stamp: pyproject.toml constraints.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(PEERS)/bin/python -m pip install --quiet --no-deps torchrec==$(TORCHREC)
	touch $@

bench: $(PEERS)/.stamp  ## Train beside peers, short form: under ten minutes
	$(PEERS)/bin/python benchmarks/speed/contest.py --short

bench-parts: $(BIN)/.package  ## Run the benchmarks of the parts, short form
	$(BIN)/python benchmarks/foundation.py
	$(BIN)/python benchmarks/optimizer_step.py --rounds 10 --sizes 0.2M 14M --tables 1M

# DATA is the folder with kuairand.parquet, online_retail.parquet and flights.parquet; what is not there is left out.
paper: $(BIN)/.dev  ## Train the study of docs/stability.md (two hours; QUICK=1: a part of it, ten minutes)
	$(BIN)/python benchmarks/stability/paper.py $(if $(QUICK),--quick) $(if $(DATA),--data $(DATA)) $(if $(WRITE),--write)

check: lint types test  ## What CI runs

clean:  ## Remove the environment and caches
	rm -rf $(VENV) $(PEERS) .pytest_cache .mypy_cache .ruff_cache .hypothesis
