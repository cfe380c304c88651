# Two commands for a fresh clone: `make demo` and `make test`.
#   VENV=folder      the environment to create and use (default .venv)
#   PIP_FLAGS="…"    options for pip, e.g. a CPU-only torch index
VENV ?= .venv
PYTHON ?= python3
PIP_FLAGS ?=
VPY := $(VENV)/bin/python

.PHONY: demo test setup lint clean-demo

# The stamp holds the digest of requirements.txt: the environment is completed when the file changes.
setup:
	@PYTHON="$(PYTHON)" PIP_FLAGS="$(PIP_FLAGS)" sh tools/setup_env.sh "$(VENV)"

demo: setup
	@$(VPY) -m experiments.run --study demo

lint: setup
	@$(VPY) -m ruff check .

test: lint
	@$(VPY) -m pytest

clean-demo:
	rm -rf logs/demo
