# Every command a person needs. Each makes its own virtual environment; the second time that takes
# seconds. PYTHON, VENV and PYTEST_ARGS can be overridden: make test PYTEST_ARGS="-k gemm".
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PYTEST_ARGS ?=
SMOKE ?=
BENCH_ARGS ?=

# OpenMP threads that wait: asleep in tests, which share the processors; some 10 us awake where speed
# counts (docs/cpu.md). libgomp's default, milliseconds, starves whoever else computes.
SPIN = $(if $(OMP_WAIT_POLICY),,GOMP_SPINCOUNT=$(or $(GOMP_SPINCOUNT),3000))
SLEEP = OMP_WAIT_POLICY=$(or $(OMP_WAIT_POLICY),PASSIVE)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help venv build demo test test-full sanitize lint format bench verify-gpu venv-peers clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(VENV)/.installed: pyproject.toml requirements/constraints.txt
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c requirements/constraints.txt "setuptools>=77" wheel cmake ninja pybind11
	@sh cmake/ensure_nvcc.sh $(PY)
	$(PY) -m pip install -q -c requirements/constraints.txt --no-build-isolation -e ".[test,demo,dev,bench]"
	@touch $@

venv: $(VENV)/.installed build ## .venv with the package and every test dependency

build: $(VENV)/.installed ## (re)compile the C++ module in place; ninja makes this a no-op when nothing changed
	@$(PY) setup.py -q build_ext --inplace > $(VENV)/build.log 2>&1 || (cat $(VENV)/build.log; exit 1)

demo: venv ## train a small DeepSeek-V3 on real text, save it, generate from it, write out/report.html
	$(SPIN) $(PY) -m model.demo $(SMOKE)

test: venv ## the default test tier (under 10 minutes on 2 cores)
	$(SLEEP) $(PY) -m pytest -m "not slow" $(PYTEST_ARGS)

test-full: venv ## nightly: everything, mutation scripts included
	$(SLEEP) $(PY) -m pytest $(PYTEST_ARGS)

sanitize: venv ## the emulator's and the CPU kernels' tests under ASan and UBSan, threads under TSan
	$(SLEEP) sh cmake/sanitize.sh emu $(PY) -m "not slow" tests/emu tests/emu_num $(PYTEST_ARGS)
	$(SLEEP) sh cmake/sanitize.sh cpu $(PY) -m "not slow" tests/test_cpu_gemm.py tests/test_cpu_mla.py \
	  tests/test_cpu_moe.py tests/test_cpu_prefill.py tests/test_cpu_rowwise.py $(PYTEST_ARGS)
	$(SLEEP) $(PY) -m pytest tests/test_cpu_threads.py $(PYTEST_ARGS)

lint: venv ## ruff and clang-format, both pinned
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	git ls-files '*.cpp' '*.hpp' '*.h' '*.cu' '*.cuh' | xargs -r $(VENV)/bin/clang-format --dry-run -Werror

format: venv ## apply ruff and clang-format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	git ls-files '*.cpp' '*.hpp' '*.h' '*.cu' '*.cuh' | xargs -r $(VENV)/bin/clang-format -i

bench: venv ## all benchmarks: out/bench.json, out/bench.html, out/roofline.png
	mkdir -p out
	$(SPIN) $(PY) -m pytest bench --benchmark-only --benchmark-json=out/pytest_benchmark.json $(PYTEST_ARGS)
	$(SPIN) $(PY) -m bench.report $(BENCH_ARGS)

verify-gpu: venv ## on a Hopper GPU: replay the CUDA tests, time, append to bench/hardware.jsonl
	$(PY) -m bench.verify_gpu

venv-peers: ## .venv-peers with the projects we compare with (they pin torch themselves)
	@test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install -q -r requirements/peers.txt
	.venv-peers/bin/python -m pip install -q --no-deps -r requirements/peers-alone.txt

clean: ## remove build products (the virtual environment stays)
	rm -rf build out dskernels/_C*.so dskernels/_kernels
