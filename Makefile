# Every target does its own set-up in .venv; the stamp makes the second time quick.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Arguments passed on: make test ARGS="-k fold", make demo ARGS="--steps 20"
ARGS ?=
# Test processes, and the threads of each
JOBS ?= 2
THREADS ?= 1
DEMO_OUTPUT ?= demo-output

.DEFAULT_GOAL := help
.PHONY: help install demo test bench table lint format clean distclean

help:
	@echo "make demo     fine-tune a real model with SECURA and LoRA, report in $(DEMO_OUTPUT)/"
	@echo "make test     the tests (those that need a GPU are skipped where there is none)"
	@echo "make bench    one layer on this machine: SECURA, LoRA, DoRA, the released way; 2 minutes"
	@echo "make table    the tables of README and docs, and the plots, from benchmarks/results/"
	@echo "make lint     ruff and mypy"
	@echo "make format   let ruff rewrite what it can"
	@echo "make install  only the environment, in $(VENV)"
	@echo "make clean    remove caches and builds; make distclean removes $(VENV) as well"

install: $(STAMP)

# The stamp goes first and comes back last: an installation that broke is begun anew.
$(STAMP): pyproject.toml constraints.txt
	@rm -f $@
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"secura needs Python 3.11 or newer, this is " + sys.version.split()[0] + \
		": make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt \
		"$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt \
		--editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m benchmarks.demo --output_dir $(DEMO_OUTPUT) --overwrite_output_dir $(ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

bench: $(STAMP)
	$(BIN)/python -m benchmarks.layer $(ARGS)

table: $(STAMP)
	$(BIN)/python -m benchmarks.report $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
