# make demo   the main job in small: trains, fits, writes a report (makes the environment first)
# make test   the tests; ARGS="-k data --slow" goes to pytest
#
# Both need a Python of 3.11 to 3.13 and nothing else. The environment is .venv, made once, and brought up to date when
# requirements.lock or pyproject.toml changes. PYTHON=/path/to/python chooses the interpreter.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help demo test environment

CANDIDATES := $(or $(PYTHON),python3 python3.13 python3.12 python3.11)
BIN := .venv/bin
READY := .venv/.ready

# Prints the first interpreter that will do. (ensurepip: some systems package it apart, and then no environment can be made.)
define FIND_PYTHON
for candidate in $(CANDIDATES); do \
    if "$$candidate" -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then \
        echo "$$candidate"; exit 0; \
    fi; \
done; \
echo "make: no Python 3.11, 3.12 or 3.13 with venv found (tried: $(CANDIDATES)); install one, on Debian and Ubuntu with its -venv package, or set PYTHON=" >&2; \
exit 1
endef

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: $(READY)
	@$(BIN)/bitlaw demo $(ARGS)

test: $(READY)
	@$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal $(ARGS)

environment: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(BIN)/python -c '' 2>/dev/null || { \
	    python=$$($(FIND_PYTHON)) || exit 1; \
	    echo "making .venv with $$($$python --version)"; \
	    $$python -m venv --clear .venv; \
	}
	@echo "installing what requirements.lock names (once; a minute or two)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
