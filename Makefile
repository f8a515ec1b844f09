# `make demo` and `make test` need nothing but Python 3.11 or newer; everything is installed into .venv, once.

# Processes that run tests side by side; each may take 3 GB of memory.
WORKERS ?= 2

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow check bench venv

VENV := .venv
NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
# The first Python that is new enough; `make PYTHON=/path/to/python demo` names another.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	if $$p $(NEW_ENOUGH) 2>/dev/null; then command -v $$p; break; fi; done)

help: ## This list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

demo: $(VENV)/.demo ## Fine-tune a small real model, show what it learned, write all three outputs
	$(VENV)/bin/jaxft demo

test: $(VENV)/.test ## The tests that need no GPU and no torch
	$(VENV)/bin/pytest --numprocesses=$(WORKERS) --dist=loadfile

test-slow: $(VENV)/.dev ## The slow tests: whole registries; torch, PEFT, bitsandbytes and llama.cpp as references
	$(VENV)/bin/pytest -m slow

check: $(VENV)/.lint ## ruff (lint and format) and pyright
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

bench: $(VENV)/.test ## Time every op of pallas_kernels, each implementation, on this machine's device
	$(VENV)/bin/python -m pallas_kernels.bench

venv: $(VENV)/.dev ## Everything for development, in .venv

$(VENV)/.created:
	@"$(PYTHON)" $(NEW_ENOUGH) 2>/dev/null || { echo "jaxft needs Python 3.11 or newer (found:" \
		"$(or $(PYTHON),none of python3.11 python3.12 python3.13 python3)); install one, or name one:" \
		"make PYTHON=/path/to/python" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	@touch $@

# One stamp for each extra of pyproject.toml. Ordinary output and warnings of pip are off, its errors are shown.
$(VENV)/.%: pyproject.toml $(VENV)/.created
	@echo 'installing jaxft[$*] into $(VENV), once: a minute or two'
	$(VENV)/bin/python -m pip install -qq -e '.[$*]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch
