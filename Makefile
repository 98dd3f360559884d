# Each target makes the environment it needs (.venv) by itself; nothing has to be activated.
#
#   PYTHON=python3.12    the interpreter to build on (default: the first of python3, python3.12,
#                        ... that is at least 3.11; a GPU host's own torch is kept in use)
#   VENV=.venv           where the environment goes
#   DEMO_ARGS, PYTEST_ARGS   passed on to the demo and to pytest
#   GPU_EXTRAS=train,test    what test-gpu installs; add flash on a Hopper GPU

VENV ?= .venv
PYTHON ?=
DEMO_ARGS ?=
PYTEST_ARGS ?=
GPU_EXTRAS ?= train,test

PY := $(VENV)/bin/python
SETUP := @PYTHON="$(PYTHON)" VENV="$(VENV)" scripts/setup.sh

.DEFAULT_GOAL := help
.PHONY: help demo demo-twins test test-gpu lint clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile

demo: ## extend a small model, compare before and after, write a report
	$(SETUP) demo
	$(PY) -m demo.run $(DEMO_ARGS)

demo-twins: ## train the demo's full-attention and all-sparse twins and compare them
	$(SETUP) demo
	$(PY) -m demo.twins $(DEMO_ARGS)

test: ## run the tests that need no GPU
	$(SETUP) dev
	$(PY) -m pytest -n auto --dist loadfile $(PYTEST_ARGS)

test-gpu: ## run the tests that need an NVIDIA GPU
	$(SETUP) $(GPU_EXTRAS)
	@$(PY) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make test-gpu needs an NVIDIA GPU that torch can use; torch %s sees none here." % torch.__version__)'
	$(PY) -m pytest -m gpu $(PYTEST_ARGS)

lint: ## check style (ruff) and types (mypy)
	$(SETUP) dev
	$(PY) -m ruff check
	$(PY) -m mypy

clean: ## remove the environment and tool caches; downloads and demo results stay
	@PYTHON="$(PYTHON)" VENV="$(VENV)" scripts/setup.sh --remove
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find longgen demo scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
