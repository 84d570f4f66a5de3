# make reproduce-table1   install what is missing, then the main job at SCALE (default: digits), of the tables in ROWS
# make publish            promote your records to results/SCALE
# make mlflow-ui          compare the published runs in MLflow
# make check-results      does every table and figure follow from its records?
# make soak MINUTES=10     break things for as long, print what was lost
# make test | test-all | lint
PYTHON ?= python3
SCALE ?= digits
MINUTES ?= 10
ROWS ?= $(or $(wildcard baselines/$(SCALE)/*.yaml),baselines/table1.yaml)
BIN = .venv/bin
# a process a core takes whole files; by their names, for those with few tests are the slow ones
SHARED = -n auto --dist loadfile --no-loadscope-reorder

.PHONY: setup reproduce-table1 publish mlflow-ui check-results test test-all soak lint

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or later is needed: make PYTHON=python3.11 setup")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint constraints.txt
	touch $@

reproduce-table1: setup
	@$(BIN)/python -m diffmoe.report.table1
	@$(BIN)/python -m diffmoe.reproduce $(ROWS:%=--rows %) --scale $(SCALE) $(ARGS)

publish: setup
	$(BIN)/python -m diffmoe.reproduce --rows baselines/table1.yaml --scale $(SCALE) --publish
	$(BIN)/python -m diffmoe.report.readme

mlflow-ui: setup
	$(BIN)/python -m diffmoe.tracking ui --scale $(SCALE)

check-results: setup
	$(BIN)/python -m diffmoe.report results/digits --check
	$(BIN)/python -m diffmoe.report results/digits/pools --check
	$(BIN)/python -m diffmoe.report results/cifar10 --check
	$(BIN)/python -m diffmoe.report results/cifar10/again --check
	$(BIN)/python -m diffmoe.report results/cifar10/float32_routers --check
	$(BIN)/python -m diffmoe.report results/cifar10/pilot --check
	$(BIN)/python -m diffmoe.report results/cifar10/pilot-clipping --check
	$(BIN)/python -m diffmoe.report results/cifar10/pilot-beta2 --check
	$(BIN)/python -m diffmoe.report results/cifar10/learning_rate --check
	$(BIN)/python -m diffmoe.report results/cifar10/smaller_rates --check
	$(BIN)/python -m ablations.report results/digits/ablations --check
	$(BIN)/python -m ablations.report results/cifar10/ablations --check
	$(BIN)/python -m diffmoe.bench --report results/bench --check
	$(BIN)/python -m diffmoe.bench.scaling_report results/bench --check
	$(BIN)/python -m diffmoe.rehearsal.report results/rehearsal --check
	$(BIN)/python tests/reliability.py results/reliability --check
	$(BIN)/python -m diffmoe.report.readme --check

test: setup
	$(BIN)/python -m pytest -q $(SHARED) -m "not slow"

test-all: setup
	$(BIN)/python -m pytest -q $(SHARED)

soak: setup
	$(BIN)/python tests/soak.py --minutes $(MINUTES) $(ARGS)

lint: setup
	$(BIN)/ruff check .
