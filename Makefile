# make demo, make test: from nothing but Python >= 3.10 and a C++ compiler; everything goes into $(VENV).
# make test PYTHON=python3 VENV=: the present environment, offline; only the extension is built, in place.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
# Passed to every `pip install`, for example an index with CPU builds of torch.
PIP_ARGS ?=
TORCH ?= $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' $(CONSTRAINTS))
DEMO_ARGS ?=
TEST_ARGS ?=
MATRIX_ARGS ?=
BENCH_ARGS ?=

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
READY :=
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
endif
PIP_INSTALL = $(PY) -m pip install --disable-pip-version-check -c $(CONSTRAINTS) $(PIP_ARGS)

.PHONY: build test test-cpu matrix lint bench plot demo wheel venv clean
.DELETE_ON_ERROR:

# From the start each time; `croc-kernels pretrain --demo --resume` goes on instead.
demo: build
	rm -rf croc-demo
	$(PY) -m croc_kernels.cli pretrain --demo $(DEMO_ARGS)

# GPU tests run where there is a GPU and say why they are skipped elsewhere.
test: build
	$(PY) -m pytest -m "not slow" $(TEST_ARGS)

test-cpu: build
	$(PY) -m pytest -m "not gpu and not slow" $(TEST_ARGS)

# The tests that touch transformers, on each version of it that the package takes (tests/matrix.py).
matrix: build
	$(PY) tests/matrix.py $(MATRIX_ARGS)

build: $(READY)
	$(PY) setup.py -q build_ext --inplace

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench: build
	$(PY) -m benchmarks.run $(BENCH_ARGS)

plot: $(READY)
	$(PY) -m benchmarks.plot

# build/lib keeps modules that were deleted or renamed since. A wheel is for all chips unless
# CROC_CUDA_ARCHS says otherwise; other builds are for the GPUs that are there.
wheel: $(READY)
	rm -rf build/lib*
	CROC_CUDA_ARCHS="$${CROC_CUDA_ARCHS-}" $(PY) -m pip wheel --no-build-isolation --no-deps -w dist .

clean:
	rm -rf build dist *.egg-info croc_kernels/*.so
	rm -rf .pytest_cache .ruff_cache .benchmarks

ifneq ($(strip $(VENV)),)
# The virtual environment with torch and the build tools, without the package.
venv: $(VENV)/.torch

# Without an NVIDIA GPU the CPU build of torch is tried first: pip finds it if one of its indexes has it.
$(VENV)/.torch: $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; \
	  sys.version_info >= (3, 10) or sys.exit("make: Python must be >= 3.10, got " + v)'
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) setuptools cmake ninja
	@if nvidia-smi -L >/dev/null 2>&1; then \
	  echo "make: NVIDIA GPU found, installing $(TORCH)"; $(PIP_INSTALL) "$(TORCH)"; \
	elif $(PIP_INSTALL) "$(TORCH)+cpu" 2>/dev/null; then \
	  echo "make: no NVIDIA GPU, installed the CPU build of $(TORCH)"; \
	else \
	  echo "make: no index given to pip has $(TORCH)+cpu, installing $(TORCH)"; \
	  $(PIP_INSTALL) "$(TORCH)"; \
	fi
	touch $@

$(VENV)/.ready: $(VENV)/.torch pyproject.toml
	$(PIP_INSTALL) --no-build-isolation -e ".[demo,test,lint]"
	touch $@
endif
