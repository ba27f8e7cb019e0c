# Everything runs in .venv, which the targets make themselves. PYTHON picks the interpreter it is made from.
PYTHON ?= python3
BIN := .venv/bin
PROMPT := class Stack:\n    """A last-in, first-out container."""\n\n    def __init__(self):\n

.PHONY: demo test test-fast test-flashinfer test-gpu compile-gpu lint check certify sanitize format clean

demo: .venv/run.stamp  ## generate from the bundled checkpoint
	printf '$(PROMPT)' | $(BIN)/specdec generate --prompt-file - --max-tokens 96 --temperature 1 --seed 3

# Two processes of one thread each, a file to one of them: faster than two threads, which most tests do not need, and those
# that do set them. 2 GiB each.
JOBS ?= 2
ON_CPU := CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
SHARED := -n $(JOBS) --dist loadfile
PYTEST := $(ON_CPU) $(BIN)/python -m pytest $(SHARED)

test: .venv/test.stamp  ## the whole test-suite, on the CPU wherever it runs
	$(PYTEST)

test-fast: .venv/test.stamp  ## without the tests that take long: under two minutes
	$(PYTEST) -m "not slow"

# FlashInfer's Python imports beside a CPU torch; what it compiles is replaced by fakes. 560 MB under build/.
FLASHINFER := build/flashinfer
test-flashinfer: .venv/test.stamp $(FLASHINFER)/stamp  ## the FlashInfer backend, without a GPU
	$(ON_CPU) TRITON_INTERPRET=1 PYTHONPATH=$(FLASHINFER):tests \
	FLASHINFER_WORKSPACE_BASE=build/flashinfer-cache \
	$(BIN)/python -m support.flashinfer_fakes $(SHARED) -q

test-gpu: .venv/test.stamp  ## the CUDA backend on a real GPU, with the gpu extra installed; skipped without one
	$(BIN)/python -m pytest -rs tests/gpu

# Needs nvcc, not a GPU. Half an hour or more on one core.
compile-gpu: .venv/run.stamp $(FLASHINFER)/stamp  ## whether FlashInfer's kernels that we use compile for an H100 and load
	PYTHONPATH=$(FLASHINFER) $(BIN)/python -m specdec.kernels.flashinfer.compile_check build/flashinfer-cache

lint: .venv/dev.stamp  ## format, lint, types (ours, and a user's by plain mypy), import layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --cache-dir build/mypy -p specdec
	cd tests/typing && ../../$(BIN)/mypy --config-file= --cache-dir ../../build/mypy-user user_code.py
	$(BIN)/lint-imports --no-cache

check: lint test  ## what CI runs

# A million samples per rule; with a vocabulary of 8 contexts come again and again. And a thousand seeds x 256 tokens
# against plain decoding. One thread is the fastest for models so small. Half an hour or more.
certify: .venv/run.stamp  ## the certificate of losslessness, at high resolution
	rm -rf build/certify
	$(BIN)/python -m specdec.eval.dev.small build/certify/checkpoint
	$(BIN)/specdec eval lossless --model build/certify/checkpoint --samples 1000000 -k 2 --threads 1 \
		--comparison-seeds 125 --comparison-tokens 256 --output build/certify/certificate.json

# The sanitizers' libraries must be there before Python; leaks are Python's own. GCC only.
SANITIZED := tests/kernels/test_cpu.py tests/kernels/test_cpu_sampling.py tests/kernels/test_cpu_decoder.py tests/engine/test_row_invariance.py
sanitize: .venv/test.stamp  ## the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	CXX=g++ SPECDEC_CXXFLAGS="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all" \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	$(BIN)/python -m pytest -s $(SANITIZED) -k "not thread_pool"

format: .venv/dev.stamp  ## rewrite the sources in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(FLASHINFER)/stamp: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(FLASHINFER) flashinfer-python==0.7.2.post1 "apache-tvm-ffi<0.2"
	$(BIN)/pip install --quiet --upgrade --target $(FLASHINFER) requests nvidia-ml-py
	touch $@

clean:
	rm -rf .venv build *.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/run.stamp: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet -e .
	touch $@

.venv/test.stamp: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet -e ".[test]"
	touch $@

.venv/dev.stamp: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@
