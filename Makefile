# What a person types. Every target makes the virtual environment it needs, installs pinned packages and builds.
#
#   make help                this list
#   make demo                trains on real data with torch's SGD and with ours, compares, draws runs/demo.png
#   make test                the whole test suite
#   make test-integrations   the same on torch $(TORCH_INTEGRATIONS) where that matters, and tests with timm and torchvision
#   make bench               measures every optimizer, 10 minutes at most; QUICK=1 takes one
#   make bench-report        benchmarks/REPORT.md and its plots, from all files in benchmarks/results
#   make docs                README, the guides and a reference from the docstrings as a site, in build/docs
#   make gpu-check           what only an NVIDIA GPU can show: builds, tests, sanitizers, benchmark (tests/gpu_check.py)
#   make lint                ruff, mypy and clang-format, as CI runs them
#   make format              rewrites the sources as `make lint` wants them
#   make clean               removes environments and builds

PYTHON ?= python3
TORCH ?= 2.13.0
TORCH_INTEGRATIONS ?= 2.14.1

VENV := .venv
VENV_INTEGRATIONS := .venv-integrations
PIP_FLAGS := --quiet --disable-pip-version-check

# Where there is an nvcc, the CUDA kernels are compiled and linked too, whatever torch is there: for this machine's GPUs,
# or for one architecture.
export FUSED_SGD_CUDA ?= $(if $(shell command -v nvcc),1,0)
export FUSED_SGD_CUDA_ARCHS ?= $(if $(shell nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null),auto,90)

PACKAGE := setup.py pyproject.toml CMakeLists.txt $(wildcard cmake/*) $(wildcard fused_sgd/*.py) \
           $(wildcard csrc/*/*.h) $(wildcard csrc/*/*.cpp) $(wildcard csrc/*/*.cu)
CXX_SOURCES := $(wildcard csrc/*/*.h) $(wildcard csrc/*/*.cpp) $(wildcard csrc/*/*.cu) $(wildcard tests/native/*) $(wildcard benchmarks/peers/*.c*)

.PHONY: help demo test test-integrations bench bench-report docs gpu-check lint format clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/installed
	$(VENV)/bin/python examples/train.py

# The pytest script, not `python -m pytest`: that would put the checkout on the path, before the installed package.
# loadgroup: what one long build serves runs in one worker (tests/test_build.py).
test: $(VENV)/installed
	$(VENV)/bin/pytest -n auto --dist loadgroup --ignore=tests/integrations

test-integrations: $(VENV_INTEGRATIONS)/installed
	$(VENV_INTEGRATIONS)/bin/pytest -n auto -m "not torch_free"

bench: $(VENV)/installed $(VENV)/peers
	$(VENV)/bin/python -m benchmarks all $(if $(QUICK),--quick)

bench-report: $(VENV)/dependencies
	$(VENV)/bin/python -m benchmarks report

docs: $(VENV)/installed $(VENV)/docs
	$(VENV)/bin/sphinx-build -q -W -c docs . build/docs
	@echo build/docs/README.html

# With the machine's own Python and torch: no environment is made, nothing is installed.
gpu-check:
	$(PYTHON) tests/gpu_check.py --stages=$(STAGES) --devices=$(DEVICES) --out=$(or $(OUT),runs/gpu-check)

lint: $(VENV)/installed $(VENV)/lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_SOURCES)

format: $(VENV)/lint
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_SOURCES)

clean:
	rm -rf $(VENV) $(VENV_INTEGRATIONS) build runs *.egg-info

# Dependencies first, then the package: only the second is repeated when a source changes. Torch's version stands in every
# command that could pull another; isolation would build against another one. setuptools would ship stale files from
# build/lib.
$(VENV)/dependencies: requirements/build.txt requirements/test.txt requirements/demo.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install $(PIP_FLAGS) torch==$(TORCH) -r requirements/test.txt
	touch $@

$(VENV_INTEGRATIONS)/dependencies: requirements/build.txt requirements/test.txt requirements/integrations.txt
	$(PYTHON) -m venv $(VENV_INTEGRATIONS)
	$(VENV_INTEGRATIONS)/bin/pip install $(PIP_FLAGS) torch==$(TORCH_INTEGRATIONS) \
	    -r requirements/test.txt -r requirements/integrations.txt
	touch $@

# One by one: a peer that cannot be installed is a row that says so, and the others are measured.
$(VENV)/peers: requirements/peers.txt $(VENV)/dependencies
	grep -v '^#' requirements/peers.txt | while read -r peer; do \
	    $(VENV)/bin/pip install $(PIP_FLAGS) --no-deps "$$peer" || echo "not installed: $$peer"; done
	touch $@

$(VENV)/docs: requirements/docs.txt $(VENV)/dependencies
	$(VENV)/bin/pip install $(PIP_FLAGS) torch==$(TORCH) -r requirements/docs.txt
	touch $@

$(VENV)/lint: requirements/lint.txt $(VENV)/dependencies
	$(VENV)/bin/pip install $(PIP_FLAGS) torch==$(TORCH) -r requirements/lint.txt
	touch $@

# One build folder for both environments: what does not know torch, the kernels, is compiled once.
%/installed: %/dependencies $(PACKAGE)
	rm -rf build/lib build/bdist*
	FUSED_SGD_BUILD_DIR=build/module $*/bin/pip install $(PIP_FLAGS) --no-build-isolation --no-deps --force-reinstall .
	touch $@
