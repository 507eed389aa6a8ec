# Every target builds the environment it needs, once: `make demo` and `make test` are all that a newcomer types.
#   make demo PYTHON=python3.12        another interpreter        make test ARGS="-k rotations"        more for the command
PYTHON ?= python3
VENV   ?= .venv
# bench/convert.py writes checkpoints of several gigabytes: run it by hand.
BENCH  ?= body decode lora_step
BIN    := $(VENV)/bin
PIP     = $(BIN)/python -m pip --disable-pip-version-check -qq
# Tests of one file share compiled functions, so files are what workers take; more than four workers only take memory.
PYTEST  = $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo pretrained test test-all lint format bench clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## */  make \1|/p' Makefile | column -t -s '|' 2>/dev/null || grep '##' Makefile

demo: $(VENV)/.installed-eval  ## train a small ChatPose, ask it for poses, leave answers and bodies in out/demo
	$(BIN)/chatpose demo --out out/demo $(ARGS)

pretrained: $(VENV)/.installed-gguf  ## fetch a small pretrained model, make a ChatPose that talks out of it, in out/pretrained
	$(BIN)/chatpose pretrained --out out/pretrained $(ARGS)

test: $(VENV)/.installed-dev  ## the tests, without the slow ones
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(VENV)/.installed-dev  ## every test
	$(PYTEST) $(ARGS)

lint: $(VENV)/.installed-dev  ## style, formatting, types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.installed-dev  ## rewrite files in the project's style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.installed-dev  ## ratios of times against PyTorch on this machine
	@for name in $(BENCH); do echo "== bench/$$name.py"; $(BIN)/python bench/$$name.py $(ARGS) || exit 1; done

clean:  ## remove what building and testing left behind; keeps .venv and out
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .venv-*
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# One environment, a stamp for each depth of it. The tests' extras hold the demo's, so the deeper stamp renews the shallower one.
$(VENV)/.installed-eval: pyproject.toml | $(BIN)/python
	@echo "Installing ChatPose-JAX and what it stands on into $(VENV) (once; a few minutes, about 1 GB) ..."
	@$(PIP) install --editable '.[eval]'
	@touch $@ && echo "Installed."

$(VENV)/.installed-gguf: $(VENV)/.installed-eval
	@$(PIP) install --editable '.[eval,gguf]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	@echo "Installing ChatPose-JAX, its tests and the peers that it is compared with into $(VENV) (once; a few minutes, about 2 GB) ..."
	@$(PIP) install --editable '.[dev]'
	@touch $(VENV)/.installed-eval $@ && echo "Installed."

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: ChatPose-JAX needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo missing)." >&2; \
	  echo "Name a newer one: make $(firstword $(MAKECMDGOALS)) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version) ..."
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
