# Every target sets up what it needs, in .venv, and does so once: the stamp files there are newer than setup.cfg.
# The venv sees the system's packages, since GPU containers bring a torch of their own.

PYTHON ?= python3
# Installed only where no torch >= 2.6 can be imported.
TORCH  ?= torch==2.13.0
# Processes of the demo.
NPROC  ?= 2
# Passed on: make demo ARGS='--variant stripe', make test ARGS='-k zigzag -x'.
ARGS   ?=
# A process for each core, up to four, each with whole files of tests; in one process: make test ARGS='-n 0'.
WORKERS := -p xdist -n logical --maxprocesses 4 --dist loadfile

VENV := .venv
PY   := $(VENV)/bin/python
PIP  := $(PY) -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-slow lint format docs bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## train the example on NPROC=2 processes; ARGS go to it
	OMP_NUM_THREADS=1 $(PY) -m torch.distributed.run --standalone --nproc-per-node $(NPROC) \
		examples/train_long_context.py $(ARGS)

test: $(VENV)/.test ## run the tests, all but the slow ones; ARGS go to pytest
	$(PY) -m pytest $(WORKERS) $(ARGS)

test-slow: $(VENV)/.test ## run the slow tests; ARGS go to pytest
	$(PY) -m pytest $(WORKERS) -m slow $(ARGS)

lint: $(VENV)/.lint ## check style, format and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV)/.lint ## rewrite the files the way lint wants them
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(VENV)/.docs ## build the documentation in out/site, warnings as errors
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

bench: $(VENV)/.bench ## run the benchmarks and print their results; ARGS go to them
	$(PY) -m benchmarks $(ARGS)

clean: ## remove .venv and everything else that is made
	rm -rf $(VENV) out build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The venv with a torch in it. The file holds that torch's version, as a constraint for what is installed later.
$(VENV)/torch.txt:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv --system-site-packages $(VENV)
	$(PY) -c 'import torch; assert torch.__version__ >= "2.6"' 2>/dev/null || $(PIP) install $(TORCH)
	$(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >$@

# This package with one of its extras: .demo, .bench, .test, .lint, .docs.
$(VENV)/.%: $(VENV)/torch.txt setup.cfg pyproject.toml
	$(PIP) install --quiet --constraint $< --editable '.[$*]'
	@touch $@
