# `make demo` and `make test` set up everything they need in .venv; nothing has to be installed by hand but Python,
# make, a C++ compiler and CMake. VENV=path uses another environment.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.scan-fast-installed
DEV    := $(VENV)/.scan-fast-dev-installed
# One process per core, with one thread each. Tests of several threads ask for them.
WORKERS  ?= logical
PARALLEL := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 8 --dist worksteal
NATIVE  := $(sort $(shell find csrc -type f \( -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh' \)))
SOURCES := setup.py pyproject.toml CMakeLists.txt csrc/sources.cmake csrc/build_facts.py scan_fast/ops/families.json $(NATIVE)

.PHONY: demo test test-fast test-oldest test-arm fuzz sanitize sanitize-threads tidy lint format reference bench results dist install clean

demo: $(STAMP)            ## all stages on the handwritten digits
	$(BIN)/scan-fast run digits

test: lint                ## every test, and the linters
	$(PARALLEL) -m "not serial"
	$(BIN)/python -m pytest -m serial

test-fast: $(DEV)         ## without the tests marked slow
	$(PARALLEL) -m "not slow and not serial"

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)
	$(BIN)/mypy
	$(BIN)/python -m tools.docs.reference --check

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

# DALI does not decode under AddressSanitizer. The C++ tests of `make test` are sanitized anyway.
sanitize: $(DEV)          ## the CPU operators under AddressSanitizer and UndefinedBehaviorSanitizer
	PATH="$(abspath $(BIN)):$$PATH" cmake --preset sanitize -DPython_EXECUTABLE=$(abspath $(BIN)/python)
	PATH="$(abspath $(BIN)):$$PATH" cmake --build --preset sanitize --target _C
	$(BIN)/python tests/native/run_sanitized.py build/sanitize -q -k "(cpu or hostile) and not compile and not dali" \
		tests/ops tests/views tests/models

# The C++ tests of the CPU kernels alone, on four threads of the C++ library. libgomp is not instrumented, nor are torch
# and Python: ThreadSanitizer would report races of theirs that are none.
sanitize-threads:         ## the CPU kernels under ThreadSanitizer
	cmake -S csrc/tests -B build/native-threads -DSCAN_FAST_SANITIZE_THREADS=ON
	cmake --build build/native-threads --target cpu_tests --parallel $$(nproc)
	SCAN_FAST_TEST_THREADS=4 TSAN_OPTIONS=halt_on_error=1 \
		ctest --test-dir build/native-threads --label-regex cpu --output-on-failure

# The C++ tests alone: they need neither torch nor Python. csrc/tests/aarch64.cmake says what must be installed.
test-arm:                 ## the CPU kernels compiled for 64-bit ARM, run by qemu
	cmake -S csrc/tests -B build/native-arm -DCMAKE_TOOLCHAIN_FILE=$(CURDIR)/csrc/tests/aarch64.cmake
	cmake --build build/native-arm --target cpu_tests --parallel $$(nproc)
	ctest --test-dir build/native-arm --label-regex cpu --output-on-failure

# tests/fuzz runs 1,500 of them. A finding names the command that repeats it.
fuzz: $(DEV)              ## a million inputs made by machines, about an hour on two cores; FUZZ="--inputs 20000 --seed 1"
	$(BIN)/python -m tools.fuzz --inputs 1000000 --json build/fuzz.json $(FUZZ)

tidy: $(DEV)              ## clang-tidy over the C++ sources, with the compile commands of the preset release
	PATH="$(abspath $(BIN)):$$PATH" cmake --preset release -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DCMAKE_CXX_COMPILER=clang++
	cmake --build build/release --target source_hashes
	printf '%s\n' $(filter %.cpp,$(filter-out csrc/tests/% csrc/testing/%,$(NATIVE))) \
		| xargs -P "$$(nproc)" -n 1 $(BIN)/clang-tidy --quiet -p build/release

reference: $(DEV)         ## docs/api.md, docs/configuration.md, table of presets
	$(BIN)/python -m tools.docs.reference

bench: $(DEV)             ## a few minutes: every stage against plain PyTorch, on the CPU
	$(BIN)/python -m benchmarks.end_to_end --device cpu --images 512 --budget 120

results: $(DEV)           ## every figure of the documentation, on an otherwise idle machine; DATA=folder of images
	$(BIN)/python -m tools.docs.record --device cpu $(if $(DATA),--data $(DATA))

dist: $(DEV)              ## the sdist and a wheel without CUDA in dist/, built and used in a fresh environment
	$(BIN)/python -m tools.check_dist --keep dist

test-oldest: $(DEV)       ## the sdist, its wheel and a part of the tests with the oldest supported Python and packages
	$(BIN)/python -m tools.test_oldest

install: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first and is not isolated: the native module is built against the very torch that will load it.
$(STAMP): $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet "torch==2.14.1" "torchvision==0.29.1"
	$(BIN)/python -m pip install --quiet pybind11 ninja
	$(BIN)/python -m pip install --no-build-isolation --editable .
	touch $@

$(DEV): $(STAMP) pyproject.toml
	$(BIN)/python -m pip install --quiet --group dev
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache scan_fast/_C*.so
