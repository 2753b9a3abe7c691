# What a user and a developer type. `make train` and `make test` start from nothing but Python 3.10+ and a C++ compiler.
#   make train     sets up .venv, builds the kernels, trains the default preset into runs/first, draws samples
#   make test      style, types, build, tests
#   make mutants   plants small faults one at a time: the tests must notice each
#   make build     compiles the kernels again after a change in csrc/
#   make gpu-test  on a machine with a GPU: builds, checks wrappers, all ops, steps as CUDA graphs, compute-sanitizer
#   make gpu-kernels  times the kernels on its card beside their peers into benchmarks/results/; again: goes on
#   make gpu-step  builds, times training steps there beside plain PyTorch's, draws the curve; again: goes on
# Variables: TORCH='torch==2.13.0' (what pip installs), PYTHON=python3, OUT=runs/first, TRAIN='--preset digits' (more
# options), KERNELS='--only "L 257"' (options of gpu-kernels), STEP='--only b256' (of gpu-step). The gpu- targets take
# .venv if it is there, else PYTHON.
PYTHON ?= python3
TORCH ?= torch==2.13.0
OUT ?= runs/first
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Tools that pip brought for lack of them on the machine: cmake, ninja.
train test build: export PATH := $(CURDIR)/$(BIN):$(PATH)

# Tests share the cores with whatever else runs: threads that wait must not hold one.
test mutants: export OMP_WAIT_POLICY := PASSIVE

.NOTPARALLEL:
.PHONY: help train test mutants build lint types links gpu-test gpu-kernels gpu-step clean

help:
	@sed -n '2,9s/^#   //p' Makefile

# A run folder is never overwritten: if $(OUT) is there, the next free numbered one is taken.
train: build
	@out="$(OUT)"; n=2; while [ -e "$$out" ]; do out="$(OUT)-$$n"; n=$$((n + 1)); done; \
	$(BIN)/python -m maskdiff.train --out "$$out" $(TRAIN); \
	$(BIN)/python -m maskdiff.sample "$$out" --out "$$out/samples.png"; \
	echo "samples: $$out/samples.png"

test: .venv/.installed-test lint types build
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

mutants: .venv/.installed-test
	$(BIN)/python tests/mutants.py

build: .venv/.installed
	@$(BIN)/python setup.py --quiet build_kernels --inplace

lint: .venv/.installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# Type checkers do not see through an editable install of kernels/, so they get a folder of links.
links:
	@mkdir -p build/links && ln -sfn ../../maskdiff build/links/maskdiff && ln -sfn ../../kernels build/links/maskdiff_kernels

types: .venv/.installed-test links
	cd build/links && ../../$(BIN)/mypy --config-file ../../pyproject.toml maskdiff maskdiff_kernels

# Nothing is installed: a machine with a GPU brings PyTorch, and finds the packages through the folder of links.
ON_GPU = PYTHONPATH=$(CURDIR)/build/links$${PYTHONPATH:+:$$PYTHONPATH} \
         $(if $(and $(filter file,$(origin PYTHON)),$(wildcard $(BIN)/python)),$(BIN)/python,$(PYTHON))

gpu-test: links
	@$(ON_GPU) tests/gpu.py

gpu-kernels: links
	@$(ON_GPU) benchmarks/gpu_kernels.py $(KERNELS)

gpu-step: links
	@$(ON_GPU) tests/gpu.py --build || echo "going on with the kernels that are there"
	@$(ON_GPU) benchmarks/gpu_step.py $(STEP)

.venv/.created:
	@$(PYTHON) -c 'import sys; sys.exit("error: Python 3.10 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	@command -v c++ > /dev/null || { echo "error: a C++ compiler is needed (GCC 10 or newer), and no c++ is there" >&2; exit 2; }
	@echo "== setting up .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv
	@$(PIP) install -q 'setuptools>=77' $$(command -v cmake > /dev/null || echo cmake ninja)
	@touch $@

.venv/.torch: .venv/.created
	@echo "== installing $(TORCH)"
	$(PIP) install $(TORCH)
	@touch $@

.venv/.installed: .venv/.torch pyproject.toml setup.py CMakeLists.txt
	@echo "== installing maskdiff and what it needs, building its kernels"
	$(PIP) install -e .
	@touch $@

# PyTorch for CUDA pins a Triton of its own; beside any other, the one that the tests were written with.
NO_TRITON := import importlib.util as u, sys; sys.exit(sys.platform == "linux" and not u.find_spec("triton"))

.venv/.installed-test: .venv/.torch pyproject.toml setup.py CMakeLists.txt
	@$(BIN)/python -c '$(NO_TRITON)' || $(PIP) install triton==3.6.0
	@echo "== installing maskdiff, what it needs and the test tools, building its kernels"
	$(PIP) install -e '.[test]'
	@touch .venv/.installed $@

clean:
	rm -rf build dist *.egg-info kernels/lib .venv
