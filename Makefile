# Everything a person or CI runs. Each target does its own set-up, in .venv; none needs root.
.DEFAULT_GOAL := help
SHELL := /bin/sh
BIN := .venv/bin
ARGS ?=
PYTEST := $(BIN)/python -m pytest

.PHONY: help demo test check fmt format-check lint types audit faults load setup clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

demo: ## the main job, end to end, on an embedded Redis (ARGS=--once: exit after the proof)
	@scripts/setup.sh embedded
	@$(BIN)/streamjobs demo $(ARGS)

test: setup ## the tests (ARGS="-k name": some of them)
	@$(PYTEST) -n 2 $(ARGS)

check: format-check lint types audit test ## what CI runs: format, lint, types, dependencies, tests

fmt: setup ## format and fix what can be fixed
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

format-check: setup
	@$(BIN)/ruff format --check .

lint: setup
	@$(BIN)/ruff check .

types: setup
	@$(BIN)/basedpyright

audit: setup ## whether what is installed fits together (offline; tests compare imports with what is declared)
	@$(BIN)/python -m pip check --disable-pip-version-check

faults: setup ## the long fault and random runs
	@$(PYTEST) -m long --timeout 1200 $(ARGS)

load: ## load scenarios beside other systems (ARGS=--quick: a short run)
	@scripts/setup.sh load
	@$(BIN)/python -m loadtests $(ARGS)

setup:
	@scripts/setup.sh dev

clean: ## remove .venv and caches
	@rm -rf .venv .cache .pytest_cache .ruff_cache .hypothesis
