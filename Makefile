# make demo and make test set up everything they need in .venv and are quick the second time.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -q
READY := $(VENV)/.ready
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.txt' -o -name '*.cmake')
# The newest Python that has venv; PYTHON=... chooses another.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3.10 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
# A torch that already runs on this machine's GPU is used as it is; elsewhere this one, whose package may bring CUDA.
TORCH ?= torch==2.13.0

.PHONY: help setup demo test test-slow lint format claims bench e2e gpu cuda triton triton-oldest clean

help:
	@echo "make demo    draw a grid of prompts, one step each, into demo.png"
	@echo "make test    run the tests         make test-slow  those over a minute, which CI runs too"
	@echo "make lint    ruff, mypy        make format  ruff and clang-format in place"
	@echo "make claims  try the papers' claims on the embedded model: 20 minutes a variant, goes on where it was stopped"
	@echo "make bench   CPU benchmarks    make gpu     GPU build, GPU tests, GPU benchmarks"
	@echo "make e2e     whole pipelines beside diffusers, on the GPU if there is one; ARGS=... as its --help says"
	@echo "make cuda    CUDA build for sm_90a, warnings as errors (needs nvcc, no GPU)"
	@echo "make triton  compile every Triton kernel with the installed Triton and with 3.6.0 (no GPU)"

setup: $(READY)

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "no Python >= 3.10 with venv found; install one or say PYTHON=..." >&2; exit 1; }
	@if $(PYTHON) -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
	  $(PYTHON) -m venv --system-site-packages $(VENV); else $(PYTHON) -m venv $(VENV); fi

# The native library is built into the editable install, so a change of its sources sets up again.
$(READY): pyproject.toml $(NATIVE) | $(VENV)/bin/python
	@echo "setting up $(VENV) ..."
	@$(PY) -c 'import torch' 2>/dev/null || $(PIP) install "$(TORCH)"
	@$(PIP) install "scikit-build-core>=0.11" "pybind11>=2.13" "cmake>=3.24" ninja
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PIP) install --no-build-isolation -e '.[dev]'
	@touch $@

demo: $(READY)
	@$(VENV)/bin/sdxl-fast demo --out demo.png

# One process per core, up to eight; plain pytest runs in one, for debuggers.
PARALLEL := -n auto --maxprocesses 8 --dist worksteal

test: $(READY)
	@$(PY) -m pytest -q $(PARALLEL)

# The longest first, as tests/conftest.py sorts them; those that share a costly fixture by one process.
test-slow: $(READY)
	@$(PY) -m pytest -q $(PARALLEL) --dist loadgroup --no-loadscope-reorder -m 'slow and not gpu and not large'

lint: $(READY)
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

format: $(READY)
	@$(VENV)/bin/ruff check --fix . ; $(VENV)/bin/ruff format .
	@find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(VENV)/bin/clang-format -i

# The pictures need npm once; CLAIMS="--only blur --seeds 0" chooses.
claims: $(READY)
	@$(VENV)/bin/sdxl-fast data emoji --out "$${SDXL_FAST_CACHE:-$$HOME/.cache/sdxl_fast}/data/emoji"
	@$(PY) -m benchmarks.claims $(CLAIMS)

bench: $(READY)
	@$(PY) -m benchmarks.cpu

# Where the system's torch runs on the GPU it is used as it is: such a machine may reach no package index.
HAS_CUDA := import torch, sys; sys.exit(not torch.cuda.is_available())
ON_GPU = if python3 -c '$(HAS_CUDA)' 2>/dev/null; then python3 -m $(1); else $(MAKE) $(READY) && $(PY) -m $(1); fi

gpu:
	@$(call ON_GPU,benchmarks.gpu)

e2e:
	@$(call ON_GPU,benchmarks.e2e $(ARGS))

# CUTLASS's headers; what the package requires is for its other uses.
.cutlass-4.2.0:
	@$(PIP) install --no-deps --target $@ nvidia-cutlass==4.2.0.0 || { rm -rf $@; exit 1; }

cuda: $(READY) .cutlass-4.2.0
	@$(VENV)/bin/cmake -S csrc -B build/cuda-90a -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja \
	  -DCUTLASS_DIR=$(CURDIR)/.cutlass-4.2.0/cutlass_library/source -DSDXL_FAST_CUDA=on \
	  -DSDXL_FAST_CUDA_ARCHS=90a -DSDXL_FAST_WERROR=ON -DSDXL_FAST_PYTHON=OFF > build/cuda-90a.log \
	  || { cat build/cuda-90a.log; exit 1; }
	@$(VENV)/bin/cmake --build build/cuda-90a

# The oldest supported Triton goes into a folder of its own, first on the path for that run.
.triton-3.6.0:
	@$(PIP) install --no-deps --target $@ triton==3.6.0 || { rm -rf $@; exit 1; }

# The slow ones are the other architectures.
TRITON_MARKS ?= not gpu
TRITON_TESTS = $(PY) -m pytest -q $(PARALLEL) -m "$(TRITON_MARKS)" --every-architecture tests/test_triton_compile.py

triton: $(READY)
	@$(PY) -c 'import triton; print("Triton", triton.__version__)'
	@$(TRITON_TESTS)
	@$(MAKE) --no-print-directory triton-oldest

triton-oldest: $(READY) .triton-3.6.0
	@PYTHONPATH=$(CURDIR)/.triton-3.6.0 $(PY) -c 'import triton; print("Triton", v := triton.__version__); assert v == "3.6.0"'
	@PYTHONPATH=$(CURDIR)/.triton-3.6.0 $(TRITON_TESTS)

clean:
	rm -rf build $(VENV) .triton-3.6.0 .cutlass-4.2.0 demo.png
