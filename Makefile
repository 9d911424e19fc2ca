# `make demo` and `make test` need Python >= 3.10, make and g++. README.md says what happens if something is missing.
PYTHON ?= python3
VENV   ?= .venv
OUT    ?= benchmarks/results
BIN    := $(VENV)/bin
ENV    := $(VENV)/.installed
# A GPU machine may have no network, so its own Python and packages are used.
GPU_PYTHON ?= python3
# Each worker uses one thread, because workers with more threads would compete for the cores.
# Bytecode is written even where the environment forbids it: workers and the processes of tests share it.
PYTEST  ?= OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(os.cpu_count(), 4))')
# Interpreted kernels keep a core busy; many other tests wait for processes that they start. Those are handed out by file,
# slow ones first: a worker makes what the tests of a file share once, and none gets all the slow tests.
INTERPRETED = TRITON_INTERPRET=1 $(PYTEST) -n $(WORKERS)
COMPILED    = $(PYTEST) -n $$(($(WORKERS) + 2)) --dist=loadfile --no-loadscope-reorder
# Folders of the results, and of kernels compiled beforehand; the latter is ignored by git.
GPU_OUT ?= gpu
GPU_KERNELS ?= build/gpu-kernels
verdict = && echo "$@: pass" || { echo "$@: fail"; exit 1; }

.PHONY: install demo demo-datafree study test test-all test-versions fuzz sanitize mutants audit lint types bench
.PHONY: docs dist clean
.PHONY: gpu gpu-kernels gpu-rehearse

# An environment with everything that a demo needs: torch, the extension and the trainer.
$(ENV): pyproject.toml setup.py MANIFEST.in $(wildcard csrc/* csrc/*/*)
	@echo "fastkd: installing torch, fastkd with its extension, and the trainer (timm, matplotlib, ...) into $(VENV)"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastkd needs Python >= 3.10: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2> /dev/null || $(BIN)/python -m pip install 'torch>=2.10'
	$(BIN)/python -m pip install -e '.[train]'
	touch $@

# The packages of one more extra. fastkd itself is already installed and is not built again.
$(VENV)/.%: $(ENV)
	@$(BIN)/python -c 'import importlib.metadata as m, re; print("fastkd: installing the packages for \"make $*\":", \
	  ", ".join(re.split("[ ;]", x)[0] for x in m.requires("fastkd") if re.search("extra == .$*.$$", x)))'
	$(BIN)/python -m pip install "fastkd[$*]"
	touch $@

install: $(ENV)
	$(BIN)/fastkd info

demo: $(ENV)
	$(BIN)/fastkd train --out runs/demo --overwrite
	$(BIN)/fastkd look runs/demo --out runs/demo/maps.png

demo-datafree: $(ENV)
	$(BIN)/python -m experiments.data_free

study: $(VENV)/.study
	$(BIN)/python -m experiments.study digits
	$(BIN)/python -m experiments.study patches --seeds 3

test: $(VENV)/.test
	$(INTERPRETED) -m 'triton and not exhaustive'
	$(COMPILED) -m 'not exhaustive'

# All tests, including the exhaustive products of options.
test-all: $(VENV)/.test
	$(INTERPRETED) -m triton
	$(COMPILED)

# The tests whose verdict depends on the versions of torch and Triton. They need neither timm nor torchvision. Kernels are
# compiled for the newer cards; `make test` compiles them for all.
test-versions: $(VENV)/.test
	$(INTERPRETED) -m 'triton and not exhaustive' tests/logits tests/prior tests/gpu/test_interpreter.py
	$(COMPILED) -m 'not exhaustive' $(foreach part,sm_90-relation sm_90-attention sm_90-rest sm_100-relation \
	  sm_100-attention sm_100-rest,'tests/gpu/test_aot.py::test_compiles[$(part)]') \
	  $(addprefix tests/operators/test_,contract.py shapes.py terms.py)

# Twenty thousand drawn calls; `make test` draws 450. Takes about ten minutes.
fuzz: $(VENV)/.test
	FASTKD_EXAMPLES=7000 $(PYTEST) -n $(WORKERS) tests/operators/test_drawn.py

# The operators' tests on an extension with AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: $(VENV)/.test
	$(BIN)/python tests/sanitize.py

# Plants the faults of tests/mutants one at a time and records the test that catches each. Takes hours on two cores.
mutants: $(VENV)/.test
	$(BIN)/python tests/mutants/run.py

# Versions and licences of all packages that fastkd and its extras need, as they are installed here.
audit: $(VENV)/.test
	$(BIN)/python -m pip check
	$(BIN)/python -m benchmarks.audit

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')

types: $(VENV)/.lint $(VENV)/.test
	$(BIN)/mypy

# Takes about ten minutes on two cores. Writes benchmarks/results/<machine>.json and the parts of the docs that show it.
bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks --device cpu --json $(OUT)
	$(BIN)/python docs/generate.py

docs: $(VENV)/.docs
	$(BIN)/python docs/generate.py --check
	$(BIN)/python -m sphinx -W --keep-going -q -E -b html docs docs/_build/html

# Everything that a GPU can tell, in one call of nine minutes; $(GPU_OUT)/gpu.json holds the results.
gpu:
	@$(GPU_PYTHON) -m benchmarks gpu-call --out $(GPU_OUT) --kernels $(GPU_KERNELS) $(verdict)

# The same steps on this machine's CPU, in a tenth of the time.
gpu-rehearse: $(VENV)/.test
	$(BIN)/python -m benchmarks gpu-call --rehearse --out $(GPU_OUT)/rehearsal

# Compiles the kernels that `make gpu` launches. VENV needs the Triton version of the GPU machine.
gpu-kernels: $(VENV)/.test
	$(BIN)/python -m benchmarks gpu-kernels $(GPU_KERNELS)

# An sdist, a manylinux wheel for every torch and Python (with CUDA where nvcc is), and dist/hub, the same for the
# Hugging Face hub; checked in an environment without a compiler. FORCE_ONLY_CPU=1 leaves CUDA out.
dist: $(VENV)/.lint $(VENV)/.dist
	rm -rf dist
	$(BIN)/python .ci/dist.py build dist
	$(BIN)/python -m twine check --strict dist/fastkd-*
	$(BIN)/python .ci/dist.py check --torch $(VENV) dist/fastkd-*.whl

clean:
	rm -rf build dist docs/_build docs/walkthrough gpu *.egg-info fastkd/_C.* fastkd/_recorder.* fastkd/_built_for.py .pytest_cache .ruff_cache .mypy_cache
