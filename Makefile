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
# The GPU machine's Python may lack xdist. Compiling 1,700 Triton kernels is most of the time, and its workers share them
# on disk. What is late is interrupted: it then still says what it found.
GPU_WORKERS = $(shell $(GPU_PYTHON) -c 'import os, xdist; print("-n", max(1, os.cpu_count() - 2), "--dist worksteal")' \
                2> /dev/null)
GPU_LIMIT  := timeout --signal=INT --kill-after=20 540
GPU_OUT ?= gpu
verdict = && echo "$@: pass" || { echo "$@: fail"; exit 1; }

.PHONY: install demo demo-datafree study test test-all test-triton mutants lint types bench docs dist clean
.PHONY: gpu gpu-build gpu-test gpu-sanitize gpu-bench gpu-training gpu-report

$(ENV): pyproject.toml setup.py MANIFEST.in $(wildcard csrc/* csrc/*/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastkd needs Python >= 3.10: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2> /dev/null || $(BIN)/python -m pip install 'torch>=2.10'
	$(BIN)/python -m pip install -e '.[train,test,lint,docs]'
	touch $@

install: $(ENV)
	$(BIN)/fastkd info

demo: $(ENV)
	$(BIN)/fastkd train

demo-datafree: $(ENV)
	$(BIN)/python -m fastkd.train.inversion.demo

study: $(ENV)
	$(BIN)/python -m fastkd.train.study

test: $(ENV)
	TRITON_INTERPRET=1 $(PYTEST) -m 'triton and not exhaustive'
	$(PYTEST) -m 'not exhaustive'

# Every product of options too.
test-all: $(ENV)
	TRITON_INTERPRET=1 $(PYTEST) -m triton
	$(PYTEST)

# The part of the tests whose verdict depends on Triton's version. PYTHONPATH may hold another one.
test-triton: $(ENV)
	TRITON_INTERPRET=1 $(PYTEST) -m 'triton and not exhaustive' tests/test_logits.py tests/test_prior.py
	$(PYTEST) -m 'not exhaustive' tests/test_aot.py

# Plants the faults of tests/mutants one at a time and records the test that catches each: some hours on two cores.
mutants: $(ENV)
	$(BIN)/python tests/mutants/run.py

lint: $(ENV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')

types: $(ENV)
	$(BIN)/mypy

# About ten minutes on two cores; writes benchmarks/results/<machine>.json and what the docs show of it.
bench: $(ENV)
	$(BIN)/python -m benchmarks --device cpu --json $(OUT)
	$(BIN)/python docs/generate.py

docs: $(ENV)
	$(BIN)/python docs/generate.py --check
	$(BIN)/python -m sphinx -W --keep-going -q -E -b html docs docs/_build/html

# Each call takes at most nine minutes; gpu.json and gpu.md in GPU_OUT say what became of all of them.
gpu:
	@$(MAKE) --no-print-directory -k gpu-build gpu-test gpu-sanitize gpu-bench gpu-training; status=$$?; \
	$(MAKE) --no-print-directory gpu-report && (exit $$status) $(verdict)

gpu-build:
	@FASTKD_BUILD_EXT=1 $(GPU_PIP) -v -e . && $(GPU_PYTHON) -m fastkd.info $(verdict)

gpu-test:
	@mkdir -p $(GPU_OUT) && OMP_NUM_THREADS=1 $(GPU_LIMIT) $(GPU_PYTHON) -m pytest -m 'not install' $(GPU_WORKERS) \
	  --ignore tests/test_aot.py --junitxml $(GPU_OUT)/tests.xml $(verdict)

gpu-sanitize:
	@$(GPU_PYTHON) -m benchmarks sanitize --json $(GPU_OUT)/sanitizer.json $(verdict)

gpu-bench:
	@$(GPU_PYTHON) -m benchmarks profile --device cuda --trace $(GPU_OUT) --json $(GPU_OUT)/profile.json; \
	$(GPU_LIMIT) $(GPU_PYTHON) -m benchmarks --device cuda --seconds 2 --json $(GPU_OUT)/cases.json $(verdict)

gpu-training:
	@$(GPU_LIMIT) $(GPU_PYTHON) -m benchmarks training --device cuda --json $(GPU_OUT)/training.json $(verdict)

gpu-report:
	@$(GPU_PYTHON) -m benchmarks gpu $(GPU_OUT) $(verdict)

# The sources, a wheel for any machine without the extension, and one for this machine and its torch.
dist: $(ENV)
	rm -rf dist
	$(BIN)/python setup.py --quiet sdist
	FASTKD_BUILD_EXT=0 $(BIN)/python -m pip wheel --quiet --no-deps -w dist .
	$(BIN)/python -m pip wheel --quiet --no-deps -w dist .
	$(BIN)/python -m twine check --strict dist/*

clean:
	rm -rf build dist docs/_build gpu *.egg-info fastkd/_C.* fastkd/_built_for.py .pytest_cache .ruff_cache .mypy_cache
