# Needs only Python 3.11 or later, pip and make. Everything is installed into .venv.
#   make serve                        serve the bundled model on port 8000
#   make serve ARGS="--port 8123"     the same with other flags
#   make test                         every test
#   make test ARGS="-k cache"         some of them

SHELL := /bin/sh
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
# Tests run in several processes, for most of their time is one thread's; four of them need 12 GB.
WORKERS := --numprocesses auto --maxprocesses 4 --dist worksteal
# What `make bench` does by itself: two minutes, and no goal that a small machine would miss.
BENCH := offline --model random:9m --compare hf --max-model-len 512 --repeats 2

.DEFAULT_GOAL := help
.PHONY: help serve test lint format typecheck bench clean

help: ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */\1\t/' | expand -t 12

serve: $(VENV)/.installed ## serve the bundled model on port 8000 (ARGS="--port 8123" passes flags on)
	$(BIN)/python -m jinfer.serve --port 8000 $(ARGS)

test: $(VENV)/.installed-test ## run every test (ARGS goes to pytest)
	$(BIN)/python -m pytest $(WORKERS) $(ARGS)

lint: $(VENV)/.installed-test ## ruff: lint and format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-test ## ruff: mend what it can, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(VENV)/.installed-test ## pyright
	$(BIN)/pyright

bench: $(VENV)/.installed-test ## benchmark beside transformers in the same run (ARGS="serve --help": another command)
	$(BIN)/python -m tools.bench $(or $(ARGS),$(BENCH))

clean: ## remove the virtual environment and every cache
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis build dist

# The environment is made by the first Python that is new enough. Some distributions ship Python without
# ensurepip; there the outer pip installs the inner one.
$(BIN)/python:
	@set -e; found=; \
	for python in python3 python3.13 python3.12 python3.11 python; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "jinfer needs Python 3.11 or later, and none was found on PATH" >&2; exit 1; fi; \
	echo "making $(VENV) with $$($$found --version)"; \
	$$found -m venv $(VENV) >/dev/null 2>&1 || { \
	  rm -rf $(VENV); \
	  $$found -m venv --without-pip $(VENV); \
	  $$found -m pip --python $(BIN)/python install --quiet pip; }

# A stamp, so that a second start installs nothing; a changed pyproject.toml installs again.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@ $(VENV)/.installed
