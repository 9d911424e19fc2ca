# On a machine with Python >= 3.10, make and g++:  make demo, make test.  What is missing there: README.md.
PYTHON ?= python3
VENV   ?= .venv
OUT    ?= benchmarks/results
BIN    := $(VENV)/bin
ENV    := $(VENV)/.installed
# On the GPU machine: its own Python, no network.
GPU_PYTHON ?= python3
GPU_PIP    := PIP_BREAK_SYSTEM_PACKAGES=1 $(GPU_PYTHON) -m pip install --no-index --no-deps --no-build-isolation
# Two workers with a thread each: xdist's workers would otherwise fight for the cores.
PYTEST ?= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4
# Named one by one: pytest collects bench_*.py only when told to.
BENCHMARKS = $(wildcard benchmarks/bench_*.py)
run-benchmarks = $(if $(BENCHMARKS),mkdir -p $(OUT) && $(1) -m pytest $(BENCHMARKS) --benchmark-json $(OUT)/benchmarks.json,echo "no benchmarks/bench_*.py")
verdict = && echo "$@: pass" || { echo "$@: fail"; exit 1; }

.PHONY: install demo test lint types bench gpu gpu-build gpu-test gpu-bench dist clean

$(ENV): pyproject.toml setup.py MANIFEST.in $(wildcard csrc/* csrc/*/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastkd needs Python >= 3.10: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2> /dev/null || $(BIN)/python -m pip install 'torch>=2.10'
	$(BIN)/python -m pip install -e '.[train,test,lint]'
	touch $@

install: $(ENV)
	$(BIN)/fastkd info

demo: $(ENV)
	$(BIN)/fastkd train

test: $(ENV)
	TRITON_INTERPRET=1 $(PYTEST) -m triton
	$(PYTEST)

lint: $(ENV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')

types: $(ENV)
	$(BIN)/mypy

bench: $(ENV)
	$(call run-benchmarks,$(BIN)/python)

gpu:
	@$(MAKE) --no-print-directory gpu-build gpu-test gpu-bench $(verdict)

gpu-build:
	@FASTKD_BUILD_EXT=1 $(GPU_PIP) -v -e . && $(GPU_PYTHON) -m fastkd.info $(verdict)

gpu-test:
	@$(GPU_PYTHON) -m pytest -m 'not install' $(verdict)

gpu-bench:
	@$(call run-benchmarks,$(GPU_PYTHON)) $(verdict)

dist: $(ENV)
	$(BIN)/python -m pip wheel --no-deps -w dist .
	$(BIN)/python setup.py sdist

clean:
	rm -rf build dist *.egg-info fastkd/_C.* fastkd/_built_for.py .pytest_cache .ruff_cache .mypy_cache
