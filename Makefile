# make reproduce-table1   install what is missing, then the main job
# make test | test-all | lint
PYTHON ?= python3
SCALE ?= digits
SEED ?= 0
SYSTEMS = baselines/configs/dense baselines/configs/token_choice baselines/configs/expert_choice diffmoe/configs/diffmoe
BIN = .venv/bin

.PHONY: setup reproduce-table1 test test-all lint

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or later is needed: make PYTHON=python3.11 setup")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint constraints.txt
	touch $@

reproduce-table1: setup
	@$(BIN)/python -m diffmoe.report.table1
	@set -e; for system in $(SYSTEMS); do \
		$(BIN)/python -m diffmoe.train --config diffmoe/configs/$(SCALE).yaml --config $$system.yaml --seed $(SEED) $(ARGS); \
	done

test: setup
	$(BIN)/python -m pytest -q -m "not slow"

test-all: setup
	$(BIN)/python -m pytest -q

lint: setup
	$(BIN)/ruff check .
